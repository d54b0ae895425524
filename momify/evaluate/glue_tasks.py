"""The nine tasks of GLUE: where each keeps its sentences and labels, and which metrics it is scored by."""

from dataclasses import dataclass

TWO_CLASSES = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
F1_AND_ACCURACY = ("f1+accuracy", "f1", "accuracy")


@dataclass(frozen=True)
class GlueTask:
    """One task. Without `classes` its label is a number (regression); `dev` are its files to score on, by suffix."""

    name: str
    folder: str
    texts: tuple[str, ...]
    """Columns of the one or two sentences."""
    label: str
    classes: tuple[str, ...] | None
    metrics: tuple[str, ...]
    """The main one first; with several others the main one is their mean."""
    header: tuple[str, ...] | None = None
    """Columns of a file that has no header line."""
    dev: tuple[tuple[str, str], ...] = (("", "dev"),)
    hub_texts: tuple[str, ...] | None = None
    """Columns on the hub, where they are others."""
    broken_rows: bool = False
    """Whether the published file has rows with too few columns, which everybody passes over."""

    @property
    def regression(self) -> bool:
        """Whether the label is a number."""
        return self.classes is None

    @property
    def outputs(self) -> int:
        """Outputs of a classifier's head."""
        return 1 if self.classes is None else len(self.classes)


GLUE = {
    task.name: task
    for task in (
        GlueTask(
            "cola", "CoLA", ("sentence",), "label", TWO_CLASSES, ("matthews",), ("source", "label", "star", "sentence")
        ),
        GlueTask("sst2", "SST-2", ("sentence",), "label", TWO_CLASSES, ("accuracy",)),
        GlueTask("mrpc", "MRPC", ("#1 String", "#2 String"), "Quality", TWO_CLASSES, F1_AND_ACCURACY,
                 hub_texts=("sentence1", "sentence2")),
        GlueTask("stsb", "STS-B", ("sentence1", "sentence2"), "score", None,
                 ("pearson+spearman", "pearson", "spearman")),
        GlueTask("qqp", "QQP", ("question1", "question2"), "is_duplicate", TWO_CLASSES,
                 F1_AND_ACCURACY, broken_rows=True),
        GlueTask("mnli", "MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
                 ("accuracy", "accuracy_m", "accuracy_mm"), dev=(("_m", "dev_matched"), ("_mm", "dev_mismatched")),
                 hub_texts=("premise", "hypothesis")),
        GlueTask("qnli", "QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
        GlueTask("rte", "RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, ("accuracy",)),
        GlueTask("wnli", "WNLI", ("sentence1", "sentence2"), "label", TWO_CLASSES, ("accuracy",)),
    )
}  # fmt: skip
