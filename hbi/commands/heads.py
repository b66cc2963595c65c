"""What a model says of videos: answers, captions, labels, and why a sentence fits."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from hbi.commands.arguments import Model, Out, Text, Tracking

Video = Annotated[Positional[str], arg(metavar="VIDEO")]
"""A video file, local or s3://."""


@dataclass(frozen=True)
class Answer:
    """Answer a question about a video.

    Example: hbi answer models:/hbi@champion clip.mp4 "what colour is the thing that moves left?"
    """

    model: Model
    """A model folder, models:/name@alias or models:/name/version, trained on questions."""
    video: Video
    """A video file, local or s3://."""
    question: Annotated[Positional[str], arg(metavar="QUESTION")]
    """What is asked."""
    answers: Annotated[tuple[str, ...], arg(metavar="ANSWER ...", help_behavior_hint="")] = ()
    """What may be answered, two or more; by default the answers that the model was trained on."""
    k: Annotated[int, arg(aliases=["-k"])] = 1
    """How many answers to print, the likeliest first, each with its probability where there are several."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        import hbi

        if self.k < 1:
            raise ValueError(f"-k {self.k}: must be at least 1")
        model = hbi.load(self.model, tracking=self.tracking)
        ranked = model.rank_answers(self.video, self.question, self.answers or None)[: self.k]
        for answer, probability in ranked:
            print(answer if self.k == 1 else f"{probability:6.3f}  {answer}")


@dataclass(frozen=True)
class Caption:
    """Write a caption for each of some videos.

    Example: hbi caption models:/hbi@champion one.mp4 two.mp4
    """

    model: Model
    """A model folder, models:/name@alias or models:/name/version, trained on captions."""
    videos: Annotated[Positional[tuple[str, ...]], arg(metavar="VIDEO ...")]
    """Video files, local or s3://."""
    beam: int = 4
    """Captions that are tried side by side; 1 takes the likeliest word, again and again."""
    no_repeat: int = 0
    """Write no run of so many tokens twice: 2 helps a model that stammers; 0 forbids none."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        import hbi

        if not self.videos:
            raise ValueError("VIDEO: none is named: give at least one")
        model = hbi.load(self.model, tracking=self.tracking)
        captions = model.caption(list(self.videos), self.beam, self.no_repeat)
        for video, caption in zip(self.videos, captions, strict=True):
            print(caption if len(self.videos) == 1 else f"{video}: {caption}")


@dataclass(frozen=True)
class Classify:
    """Choose between labels for a video, without training on them.

    Example: hbi classify models:/hbi@champion clip.mp4 --labels "a red square" "a blue star"
    """

    model: Model
    """A folder, models:/name@alias, models:/name/version, or the file of a published checkpoint."""
    video: Video
    """A video file, local or s3://."""
    labels: Annotated[tuple[str, ...], arg(metavar="LABEL ...")]
    """What the video may show."""
    template: str = "{}"
    """The sentence around a label, as "a video of {}"."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        import hbi

        model = hbi.load(self.model, tracking=self.tracking)
        for label, probability in model.classify(self.video, list(self.labels), self.template):
            print(f"{probability:6.3f}  {label}")


@dataclass(frozen=True)
class Explain:
    """Draw which word of a sentence met which frame of a video.

    Example: hbi explain models:/hbi@champion one.mp4 "the red square moves left" why.png
    """

    model: Model
    """A folder, models:/name@alias, models:/name/version, or the file of a published checkpoint."""
    video: Video
    """The video, local or s3://."""
    text: Text
    """The sentence."""
    out: Out
    """The picture to write, .png, .svg or .pdf."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        import hbi
        from hbi.serving.picture import draw_explanation, require_picture

        require_picture(self.out)
        explanation = hbi.load(self.model, tracking=self.tracking).explain(self.video, self.text)
        draw_explanation(explanation, self.text, self.out)
        print(self.out)
