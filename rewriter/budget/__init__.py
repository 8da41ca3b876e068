"""Chooses bits and block sizes for each weight, so that the model fits a number of bytes."""
