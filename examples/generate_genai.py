"""Continue a text with ONNX Runtime GenAI, from a folder that ``rewriter apply`` wrote.

pip install onnxruntime-genai
rewriter apply exported -o int4
python examples/generate_genai.py int4 "Once upon a time"
"""

from __future__ import annotations

import sys

import onnxruntime_genai as og


def generate(folder: str, prompt: str, length: int = 32) -> str:
    """Returns the prompt with its most likely continuation, at most ``length`` tokens in all."""
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    text: str = tokenizer.decode(generator.get_sequence(0))
    return text


if __name__ == "__main__":
    print(generate(*sys.argv[1:3]))
