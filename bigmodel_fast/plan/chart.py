"""A picture of a plan: for each way to cut a step the memory it takes by part, what the device has, and its speed."""

from pathlib import Path

from ..train import ConfigError
from .planner import Option, Plan

COLOURS = {
    "weights": "#1f5fa8",
    "gradients": "#6f9fd0",
    "optimizer": "#b8d0ea",
    "activations": "#d1495b",
    "logits and loss": "#e8975a",
    "packed copies and workspace": "#f3cd8b",
}
UNFIT = 0.35  # opacity of a bar that does not fit
MOST_BATCHES = 9
GIB = 2.0**30


def save_chart(plan: Plan, path: str) -> None:
    """Writes a PNG. ConfigError if it cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ways = list(dict.fromkeys((o.parallel, o.recompute) for o in plan.options))
    groups = [[o for o in plan.options if (o.parallel, o.recompute) == way][-MOST_BATCHES:] for way in ways]
    figure = Figure(figsize=(11, 1.6 + 2.6 * ((len(groups) + 1) // 2)), dpi=130, layout="constrained")
    panels = figure.subplots((len(groups) + 1) // 2, 2, sharey=True, squeeze=False).ravel()
    limit = plan.usable_memory / GIB
    sums = [sum(o.memory.parts().values()) / GIB for o in plan.options]
    top = 1.5 * min(max(limit, min(sums)), max(sums))
    for panel, way, group in zip(panels, ways, groups, strict=True):
        _draw(panel, plan, group, limit, top)
        parallel = "" if way[0] == "one" else f"{way[0]} over {plan.devices}, "
        panel.set_title(parallel + ("blocks recomputed" if way[1] else "all activations kept"), loc="left", fontsize=10)
    for panel in panels[::2]:
        panel.set_ylabel("GiB on a device")
    for panel in panels[-2:]:
        panel.set_xlabel("sequences a pass")
    patches = [Patch(color=colour, label=part) for part, colour in COLOURS.items()]
    line = Line2D([], [], color="#333333", linewidth=1.2, label="what a run may take")
    figure.legend(handles=[*patches, line], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(
        f"{plan.name}, {plan.parameters / 1e6:,.0f}M parameters, {plan.tokens_per_step:,} tokens a step, {plan.dtype}: "
        f"memory and speed on {plan.hardware.about}{f' x {plan.devices}' if plan.devices > 1 else ''} (a model)",
        x=0.01,
        ha="left",
        fontsize=10.5,
        fontweight="bold",
    )
    try:
        figure.savefig(Path(path).expanduser(), format="png")
    except OSError as error:
        raise ConfigError(f"chart: cannot write to {path} ({error.strerror})") from None


def _draw(axes, plan: Plan, group: list[Option], limit: float, top: float) -> None:
    """Stacked bars; what is above `top` is cut off. Over each the tokens per second, in bold for the best."""
    bottom = [0.0] * len(group)
    for part, colour in COLOURS.items():
        heights = [o.memory.parts()[part] / GIB for o in group]
        bars = axes.bar(range(len(group)), heights, 0.72, bottom, color=colour, zorder=2)
        for bar, o in zip(bars, group, strict=True):
            bar.set_alpha(1.0 if o.fits else UNFIT)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(limit, color="#333333", linewidth=1.2, zorder=3)
    for i, (o, height) in enumerate(zip(group, bottom, strict=True)):
        text = f"{_short(o.tokens_per_second)} tokens/s" if o.fits else "does not fit"
        axes.text(
            i,
            min(height + 0.02 * top, 0.96 * top),
            text,
            rotation=90,
            ha="center",
            va="bottom" if height < 0.65 * top else "top",
            fontsize=8,
            fontweight="bold" if o is plan.best else "normal",
            color="#222222",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.75},
            zorder=4,
        )
    axes.set_xticks(range(len(group)), [str(o.batch) for o in group])
    axes.set_ylim(0, top)
    axes.grid(axis="y", color="#e6e6e6", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _short(rate: float) -> str:
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}K" if rate >= 1e3 else f"{rate:.0f}"
