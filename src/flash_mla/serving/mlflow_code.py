"""What a model directory holds in a pickle's place: code, which MLflow runs to get the model."""

from mlflow.models import set_model

from flash_mla.serving.mlflow import CompletionModel

set_model(CompletionModel())
