"""Finds rules and rule sets in the packages that the entry-point group ``rewriter.rules`` names.

Every module of such a package whose name does not start with ``_`` is one rule, and its id is the module's name with
``-`` for ``_``; subpackages are not searched. ``<package>/sets/*.yaml`` are its rule sets. A rule's module is not
imported here but when the rule is first asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from types import ModuleType

from rewriter.errors import RuleSetError

GROUP = "rewriter.rules"


@dataclass(frozen=True)
class RuleOffer:
    """A rule that a package offers, not yet imported."""

    name: str
    package: str

    @property
    def module(self) -> str:
        """The module to import."""
        return f"{self.package}.{self.name.replace('-', '_')}"


@dataclass(frozen=True)
class SetOffer:
    """A rule set that a package offers, not yet read."""

    name: str
    package: str
    path: Traversable

    @property
    def label(self) -> str:
        """The file, as messages name it."""
        return f"{self.package}/sets/{self.path.name}"


def rule_offers() -> dict[str, RuleOffer]:
    """Returns where each rule lives, by id.

    Raises:
        RuleSetError: a package cannot be imported, or two packages offer the same id.
    """
    offers: dict[str, RuleOffer] = {}
    for package in _packages():
        for module in pkgutil.iter_modules(package.__path__):
            if not module.ispkg and not module.name.startswith("_"):
                offer = RuleOffer(module.name.replace("_", "-"), package.__name__)
                _only(offers.setdefault(offer.name, offer), offer)
    return offers


def set_offers() -> dict[str, SetOffer]:
    """Returns the file of each shipped rule set, by id.

    Raises:
        RuleSetError: a package cannot be imported, or two packages offer the same id.
    """
    offers: dict[str, SetOffer] = {}
    for package in _packages():
        for path in _yaml_files(resources.files(package) / "sets"):
            offer = SetOffer(path.name.removesuffix(".yaml"), package.__name__, path)
            _only(offers.setdefault(offer.name, offer), offer)
    return offers


def import_or_raise(module: str, what: str) -> ModuleType:
    """Imports a module of a rule package.

    Raises:
        RuleSetError: it fails to import, for whatever reason.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise RuleSetError(f"{what} cannot be imported: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Returns an exception's kind and message."""
    return f"{type(error).__name__}: {error}"


def _packages() -> Iterator[ModuleType]:
    # One package may be found twice: as a distribution and in a source tree on the path.
    for name in sorted({entry.value for entry in metadata.entry_points(group=GROUP)}):
        package = import_or_raise(name, f"the rule package '{name}'")
        if not hasattr(package, "__path__"):
            raise RuleSetError(f"the entry point '{name}' of group {GROUP} is not a package")
        yield package


def _yaml_files(folder: Traversable) -> Iterable[Traversable]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in files if path.name.endswith(".yaml")), key=lambda path: path.name)


def _only(first: RuleOffer | SetOffer, offer: RuleOffer | SetOffer) -> None:
    if first is not offer:
        kind = "rule" if isinstance(offer, RuleOffer) else "rule set"
        raise RuleSetError(f"two packages offer the {kind} '{offer.name}': '{first.package}' and '{offer.package}'")
