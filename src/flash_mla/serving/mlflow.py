"""A model on paged latents as an MLflow pyfunc: one directory for `load_model`, the scoring server and `spark_udf`."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

from .completion import Completer, CompletionOptions, check_batch_size

try:
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType
except ImportError as error:
    raise ImportError(
        f"flash_mla.serving.mlflow needs {error.name}: pip install 'transformers-flash-mla[mlflow]'"
    ) from error

__all__ = ["CompletionModel", "pyfunc_arguments", "save_model"]

CODE = Path(__file__).with_name("mlflow_code.py")
KINDS = {bool: DataType.boolean, int: DataType.long, float: DataType.double}
# What a checkpoint is read from: no .bin and no .pt, which are pickles.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


class CompletionModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """The pyfunc: column `prompt` in; `text`, `tokens`, `num_prompt_tokens` and `finish_reason` out, row by row.

    `model_config`: `dtype` and `device` of `Completer`, `batch_size` of its calls. A prompt that cannot be continued
    fails the whole call; a scoring server answers 400.
    """

    def load_context(self, context: Any) -> None:
        """Load the checkpoint that was saved with the model."""
        settings = dict(context.model_config)
        self.batch_size = settings.pop("batch_size")
        self.completer = Completer(str(Path(context.artifacts["config.json"]).parent), **settings)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
        """Continue each prompt; `params` are those of `CompletionOptions`, checked and filled in by the signature."""
        try:
            options = CompletionOptions(**(params or {}))
        except ValueError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        completions = self.completer(model_input["prompt"].tolist(), options, batch_size=self.batch_size)
        errors = [f"row {row}: {done.error}" for row, done in enumerate(completions) if done.error is not None]
        if errors:
            raise MlflowException("flash_mla.serving: " + "; ".join(errors), error_code=INVALID_PARAMETER_VALUE)
        return pd.DataFrame([asdict(done) for done in completions]).drop(columns="error")


def save_model(path: str | Path, model: str | Path, **settings: Any) -> None:
    """Write an MLflow model directory that holds the checkpoint and no pickle.

    Args:
        path: folder that does not exist or is empty.
        model, settings: as `pyfunc_arguments`.
    """
    mlflow.pyfunc.save_model(path=str(path), **pyfunc_arguments(model, **settings))


def pyfunc_arguments(
    model: str | Path,
    *,
    options: CompletionOptions | None = None,
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
    pip_requirements: list[str] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `mlflow.pyfunc.save_model`, and of `mlflow.pyfunc.log_model` beside its `name`.

    Args:
        model: folder of a checkpoint, or a Hub id, whose safetensors and tokenizer files are downloaded.
        options: what `params` are where a call gives none; default: `CompletionOptions()`.
        dtype, device, batch_size: as `Completer`, kept as `model_config`; decided where the model is loaded if None.
        pip_requirements: default: this package, mlflow, torch and transformers in the versions that are installed.
    Raises: ValueError: batch_size, or a folder that holds no safetensors file. OSError: no such model.
    """
    check_batch_size(batch_size)
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model), allow_patterns=CHECKPOINT_FILES))
        except (OSError, ValueError) as error:
            raise OSError(
                f"flash_mla.serving.mlflow: model must be a folder or a model's id on the Hub, got '{model}': {error}"
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"flash_mla.serving.mlflow: a checkpoint must have safetensors files, {folder} has none")
    defaults = options or CompletionOptions()
    params = [
        ParamSpec(field.name, KINDS[type(field.default)], getattr(defaults, field.name)) for field in fields(defaults)
    ]
    outputs = [
        ColSpec(DataType.string, "text"),
        ColSpec(Array(DataType.long), "tokens"),
        ColSpec(DataType.long, "num_prompt_tokens"),
        ColSpec(DataType.string, "finish_reason"),
    ]
    return {
        "python_model": str(CODE),
        "artifacts": {file.name: str(file) for pattern in CHECKPOINT_FILES for file in sorted(folder.glob(pattern))},
        "model_config": {"dtype": dtype, "device": device, "batch_size": batch_size},
        "signature": ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "prompt")]), outputs=Schema(outputs), params=ParamSchema(params)
        ),
        "input_example": (pd.DataFrame({"prompt": ["The latent is"]}), {"max_new_tokens": 8}),
        "pip_requirements": pip_requirements or _requirements(),
    }


def _requirements() -> list[str]:
    from .. import __version__

    return [
        f"transformers-flash-mla[mlflow]=={__version__}",
        f"mlflow-skinny=={mlflow.__version__}",
        f"torch=={torch.__version__.split('+')[0]}",  # "+cpu" and "+cu129" are on no index that pip looks at by itself
        f"transformers=={transformers.__version__}",
    ]
