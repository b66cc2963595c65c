"""What an evaluation found, as a table in a terminal."""


def table(metrics: dict[str, float], split: str) -> str:
    """The metrics of a split as small tables: retrieval beside chance, answers beside guessing, captions."""
    parts = (("texts", _retrieval), ("qa/accuracy", _answers), ("caption/CIDEr", _captions))
    return "\n".join(show(metrics, split) for name, show in parts if f"{split}/{name}" in metrics)


def _retrieval(metrics: dict[str, float], split: str) -> str:
    texts, videos = (round(metrics[f"{split}/{name}"]) for name in ("texts", "videos"))
    columns = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")
    ways = dict.fromkeys(name.split("/")[1] for name in metrics if name.endswith("/R@1"))
    head = f"{split}: {videos} clips, {texts} texts"
    rows = {way: [metrics[f"{split}/{way}/{column}"] for column in columns] for way in ways}
    rows["t2v by chance"] = [min(100.0, 100 * k / videos) for k in (1, 5, 10, 50)] + [(videos + 1) / 2] * 2
    lines = [f"{head:34}" + "".join(f"{column:>9}" for column in columns)]
    lines += [f"  {name:32}" + "".join(f"{value:9.2f}" for value in row) for name, row in rows.items()]
    out = {name: round(metrics[f"{split}/{name}"]) for name in ("uncaptioned", "unread")}
    return "\n".join(
        [*lines, *(f"  {count} clips were left out: {name}" for name, count in out.items() if count)]
    )


def _answers(metrics: dict[str, float], split: str) -> str:
    """Percent of the questions answered rightly, by type, beside always the most common answer."""
    found = {name.removeprefix(f"{split}/qa/"): value for name, value in metrics.items()}
    kinds = [name.removeprefix("accuracy/") for name in found if name.startswith("accuracy/")]
    head = f"{split}: {round(found['questions'])} questions"
    lines = [f"{head:34}{'right %':>9}{'guessed %':>11}"]
    lines.append(f"  {'all':32}{found['accuracy']:9.2f}{found['baseline']:11.2f}")
    lines.append(f"  {'all, guessed by type':32}{found['accuracy']:9.2f}{found['baseline_by_type']:11.2f}")
    if "accuracy_in_vocabulary" in found:
        lines.append(f"  {'answer in the vocabulary':32}{found['accuracy_in_vocabulary']:9.2f}")
    lines += [
        f"  {kind:32}{found[f'accuracy/{kind}']:9.2f}{found[f'baseline/{kind}']:11.2f}" for kind in kinds
    ]
    return "\n".join(lines)


def _captions(metrics: dict[str, float], split: str) -> str:
    """The usual way to print them: times 100."""
    names = ["BLEU@4", "ROUGE-L", "CIDEr"]
    if f"{split}/caption/METEOR" in metrics:
        names.insert(1, "METEOR")
    head = f"{split}: {round(metrics[f'{split}/caption/videos'])} captions, x 100"
    values = [100 * metrics[f"{split}/caption/{name}"] for name in names]
    return (
        f"{head:34}" + "".join(f"{n:>9}" for n in names) + f"\n{'':34}" + "".join(f"{v:9.2f}" for v in values)
    )
