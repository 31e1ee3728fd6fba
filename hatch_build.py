"""Build hook: compiles the device code, so that the wheel holds cubins and needs no compiler where it is installed.

On Linux a kernel that does not compile fails the build: a wheel that quietly lacks it would hide the breakage.
FLASH_MLA_KERNEL=0, or another system, gives a wheel of Python alone. Either way the tag is py3-none-any: a cubin is
data for the driver, linked to no interpreter and no libtorch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _load_build() -> ModuleType:
    """`src/flash_mla/_build.py` by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("_build", Path(__file__).parent / "src" / "flash_mla" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_build = _load_build()


class KernelBuildHook(BuildHookInterface):
    def dependencies(self) -> list[str]:
        """The compiler and its headers, for the isolated environment of this build alone."""
        return list(_build.REQUIREMENTS) if _build.is_wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # Cubins of an earlier build of this tree must not get into a wheel that is to hold none, or others.
        _build.remove()
        if _build.is_wanted():
            _build.build()
            build_data["artifacts"] += ["/src/flash_mla/cubins/*.cubin", f"/src/flash_mla/cubins/{_build.MANIFEST}"]
