"""What an evaluation found, as a table in a terminal."""


def table(metrics: dict[str, float], split: str) -> str:
    """The metrics of a split as a small table, beside chance."""
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
