"""Makes Triton run in its interpreter where there is no GPU; this has to happen before anything imports triton."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from fake_cuda import FakeDriver
    from pyspark.sql import SparkSession

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def append_cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`append.cubin` of the sources as they are, in a folder of its own."""
    from flash_mla import _build

    out = tmp_path_factory.mktemp("cubins")
    _build.build(["append"], out=out)
    return out / "append.cubin"


@pytest.fixture
def fake_driver(append_cubin: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeDriver]]:
    """Puts a fake in the place of libcuda.so.1 for the length of a test; arguments are those of `FakeDriver`."""
    from fake_cuda import FakeDriver

    from flash_mla.backends.cuda import driver

    installed: list[FakeDriver] = []

    def install(**settings: Any) -> FakeDriver:
        fake = FakeDriver(**settings)
        installed.append(fake)
        monkeypatch.setattr(driver, "_load_library", lambda: fake)
        driver.reset()
        return fake

    monkeypatch.setattr(driver, "CUBINS", append_cubin.parent)
    yield install
    driver.reset()
    for fake in installed:
        for error in fake.errors:
            raise error


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """Spark on two Python workers of this machine; a Java comes from pip if there is none."""
    import jvm
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        if not jvm.is_installed():
            patch.setenv("JAVA_HOME", str(jvm.home(tmp_path_factory.mktemp("java"))))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        builder = SparkSession.builder.master("local[2, 2]")  # two tasks at a time, two attempts at each
        for name, value in {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.sql.shuffle.partitions": "2",
            "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        }.items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        yield session
        session.stop()
