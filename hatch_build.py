"""Compiles the kernel where there is a C compiler, for wheels and editable installs alike.

A wheel with the kernel is for one platform, but for every version of Python and torch: the kernel knows neither.
Without a compiler the wheel is pure Python, and the library says when it is used that the kernel is missing.
"""

import importlib.util
import os
import re
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """Leaves the library beside the code that loads it, where git ignores it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library and tag the wheel."""
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("native_build", root / "native" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        folder = root / "src" / "secateur" / "runtime"
        try:
            paths = script.build(folder)
        except RuntimeError as error:
            self.app.display_warning(f"secateur is installed without its kernel: {error}")
            return
        if paths is None:
            self.app.display_warning("secateur is installed without its kernel: there is no C compiler")
            return
        self.app.display_info(f"kernel: {', '.join(paths)}")
        platform = os.environ.get("SECATEUR_WHEEL_PLATFORM") or sysconfig.get_platform()
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{re.sub('[^a-z0-9]', '_', platform.lower())}"
        build_data["artifacts"].append(f"/src/secateur/runtime/{script.LIBRARY}")
