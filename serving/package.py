"""What an MLflow version of a model holds beside its weights: the script that MLflow runs, and the code it imports."""

from hbi.infra.mlflow.registry import ModelPackage
from hbi.infra.project import ROOT

PACKAGE = ModelPackage(
    script=ROOT / "hbi" / "serving" / "pyfunc.py",
    code=(
        "hbi/__init__.py",
        "hbi/model",
        "hbi/infra/__init__.py",
        "hbi/infra/project.py",
        "hbi/pipelines/__init__.py",
        "hbi/pipelines/decoding",
        "hbi/serving/__init__.py",
        "hbi/serving/model.py",
    ),
    requirements=(
        "mlflow",
        "torch",
        "transformers",
        "ftfy",
        "safetensors",
        "numpy",
        "pandas",
        "pillow",
        "av",
        "jaxtyping",
    ),
    example={"text": ["a red square moves left"]},
)
"""Written down, and not derived: what is added to it is a decision. A fixed list of requirements, since letting MLflow
infer one costs ten seconds and guesses."""
