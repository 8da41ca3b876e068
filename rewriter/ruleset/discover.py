"""Finds rules and rule sets in the packages that the entry-point group ``rewriter.rules`` names.

Every module of such a package whose name does not start with ``_`` is one rule, and its id is the module's name with
``-`` for ``_``; subpackages are not searched. ``<package>/sets/*.yaml`` are its rule sets. Nothing of a package is
imported here, but when one of its rules is first asked for: a package that fails harms nobody who does not use it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import ClassVar, TypeVar

from rewriter.errors import RuleSetError, warn
from rewriter.text import names

GROUP = "rewriter.rules"
SHIPPED = "rewriter.rules"
"""The package of the rules that come with this project."""


@dataclass(frozen=True)
class RuleOffer:
    """A rule that a package offers, not yet imported.

    Attributes:
        name: its id.
        package: the package that offers it.
        rivals: other packages that offer the same id; with one, nobody can say which is meant.
    """

    name: str
    package: str
    rivals: tuple[str, ...] = ()

    kind: ClassVar[str] = "rule"

    @property
    def module(self) -> str:
        return f"{self.package}.{self.name.replace('-', '_')}"


@dataclass(frozen=True)
class SetOffer:
    """A rule set that a package offers, not yet read; as ``RuleOffer``.

    Attributes:
        path: its file.
    """

    name: str
    package: str
    path: Path
    rivals: tuple[str, ...] = ()

    kind: ClassVar[str] = "rule set"

    @property
    def label(self) -> str:
        """The file, as messages name it."""
        return f"{self.package}/sets/{self.path.name}"


Offer = TypeVar("Offer", RuleOffer, SetOffer)


def rule_offers() -> dict[str, RuleOffer]:
    """Returns where each rule lives, by id."""
    return _by_name(
        RuleOffer(module.name.replace("_", "-"), package)
        for package, folders in _packages()
        for module in pkgutil.iter_modules(folders)
        if not module.ispkg and not module.name.startswith("_")
    )


def set_offers() -> dict[str, SetOffer]:
    """Returns the file of each shipped rule set, by id."""
    return _by_name(
        SetOffer(path.name.removesuffix(".yaml"), package, path)
        for package, folders in _packages()
        for folder in folders
        for path in sorted(Path(folder, "sets").glob("*.yaml"))
    )


def require_only(offer: RuleOffer | SetOffer) -> None:
    """Refuses an id that several packages offer.

    Raises:
        RuleSetError: names the packages.
    """
    if offer.rivals:
        packages = names([repr(package) for package in (offer.package, *offer.rivals)])
        raise RuleSetError(f"several packages offer the {offer.kind} '{offer.name}': {packages}; uninstall all but one")


def import_or_raise(module: str, what: str) -> ModuleType:
    """Imports a module of a rule package.

    Raises:
        RuleSetError: it fails to import, for whatever reason.
    """
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise RuleSetError(f"{what} cannot be imported: {reason(error)}") from error


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def skip(what: str, why: str) -> None:
    """Warns of something of an installed package that is left out."""
    warn(f"{what} is skipped: {why}")


def _packages() -> Iterator[tuple[str, list[str]]]:
    """Yields each package with its folders, this project's own first."""
    # One package may be found twice: as a distribution and in a source tree on the path.
    found = {entry.value for entry in metadata.entry_points(group=GROUP)}
    for name in sorted(found, key=lambda name: (name != SHIPPED, name)):
        try:
            spec = importlib.util.find_spec(name)
        except (Exception, SystemExit) as error:  # a package above it is imported for this
            skip(f"the rule package '{name}'", f"it cannot be found ({reason(error)}); mend or uninstall it")
            continue
        if spec is None or spec.submodule_search_locations is None:
            why = "there is no such package" if spec is None else "it is not a package"
            skip(f"the entry point '{name}' of group {GROUP}", f"{why}; mend or uninstall what installed it")
        else:
            yield name, list(spec.submodule_search_locations)


def _by_name(offers: Iterable[Offer]) -> dict[str, Offer]:
    """Returns the offers by id; what this project ships cannot be taken over by another package."""
    found: dict[str, Offer] = {}
    for offer in offers:
        first: Offer = found.setdefault(offer.name, offer)
        if first.package == offer.package:
            continue
        if first.package == SHIPPED:
            skip(f"the {offer.kind} '{offer.name}' of package '{offer.package}'", f"'{SHIPPED}' ships one of that name")
        else:
            found[offer.name] = replace(first, rivals=(*first.rivals, offer.package))
    return found
