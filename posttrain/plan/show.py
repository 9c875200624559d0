"""A plan on the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

KINDS = {
    "speed": "",
    "format": "8-bit products",
    "gpus": "more GPUs",
    "data": "shorter rows",
    "result": "another training",
}


def show(found: dict[str, Any], file: Any = None) -> None:
    """Print what `posttrain.plan.report.report` returns."""
    console = Console(highlight=False, file=file)
    count, gpu = found["parameters"], found["gpu"]
    console.print(
        f"[bold]{escape(found['model'])}[/]  {_count(count['model'])} parameters, "
        f"{_count(count['trainable'])} trained ({count['trainable'] / count['total']:.2%})"
    )
    layout = ", ".join(f"{name} {size}" for name, size in found["layout"].items() if size > 1)
    rate = f"{gpu['bf16_tflops']:g} TFLOP/s" if gpu["bf16_tflops"] else "rate not known"
    console.print(
        f"{gpu['count']} x {gpu['name']}{' (assumed: plan.gpu=...)' if gpu['assumed'] else ''}, "
        f"{gpu['memory_gib']:g} GiB, {rate} in bf16{'; parallel: ' + layout if layout else ''}"
    )
    if found["auto"]:
        console.print(found["auto"])
    console.print(_memory(found))
    console.print(_run(found))
    needed, has = found["memory_gib"]["needed"], gpu["memory_gib"]
    if found["fits"]:
        console.print(f"[green]fits[/]: {needed:.1f} of {has:g} GiB")
    else:
        console.print(f"[red]does not fit[/]: {needed:.1f} GiB needed, {has:g} there")
        best = found["cheapest_change"]
        if best:
            console.print(f"cheapest change that fits: [bold]{' '.join(best['words'])}[/]  {_effect(best)}")
        else:
            console.print("no combination of changes makes it fit on these GPUs")
    if found["changes"]:
        console.print(_changes(found["changes"]))


def _memory(found: dict[str, Any]) -> Table:
    table = Table(title="Memory per GPU, GiB", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("of which", style="dim")
    detail, sizes = found["memory_gib"]["detail"], found["memory_gib"]
    for name, size in sizes["parts"].items():
        terms = {"activations": "layer", "logits and loss": "loss"}.get(name)
        text = ""
        if terms:
            largest = sorted(detail[terms].items(), key=lambda item: -item[1])[:4]
            text = ("a layer: " if terms == "layer" else "") + ", ".join(f"{n} {v:.3f}" for n, v in largest)
        table.add_row(name, f"{size:.2f}", text)
    table.add_row("[bold]peak[/]", f"[bold]{sizes['peak']:.2f}[/]", "what summary.json reports as peak_memory_gib")
    table.add_row("outside", f"{sizes['outside']:.2f}", "CUDA context, NCCL")
    table.add_row("[bold]needed[/]", f"[bold]{sizes['needed']:.2f}[/]", "with 3 % lost between blocks")
    return table


def _run(found: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    data, speed = found["data"], found["speed"]
    if "not_counted" in data:
        table.add_row("data", f"not counted: {escape(data['not_counted'])}; all tokens taken as trained")
    else:
        sampled = f" (by the first {data['read']:,})" if data["read"] < data["conversations"] else ""
        share = data["trained"] / data["tokens"]
        table.add_row("data", f"{data['conversations']:,} conversations{sampled}, {data['tokens']:,} tokens, "
                              f"{share:.0%} trained, {data['rows']:,} rows")  # fmt: skip
    steps = "not known: give trainer.max_steps" if found["steps"] is None else f"{found['steps']:,}"
    table.add_row("steps", f"{steps} of {found['tokens_per_step']:,} tokens")
    if speed["step_s"]:
        total = f", {_time(speed['total_s'])} in all" if speed["total_s"] is not None else ""
        table.add_row("time", f"{speed['step_s']:.2f} s a step, {speed['tokens_per_second']:,} tokens/s, MFU "
                              f"{speed['mfu']:.0%}{total}")  # fmt: skip
        table.add_row("", f"[dim]limited by {speed['bound']}; measured on an H200; without start, validation, "
                          "communication[/]")  # fmt: skip
    return table


def _changes(changes: list[dict[str, Any]]) -> Table:
    table = Table(title="One change", title_justify="left")
    for name in ("words", "GiB", "fits", "time", ""):
        table.add_column(name, justify="right" if name in ("GiB", "time") else "left", overflow="fold")
    for change in changes:
        fits = "[green]yes[/]" if change["fits"] else "[red]no[/]"
        more = f"{change['gpus']} GPUs" if change["kind"] == "gpus" else KINDS[change["kind"]]
        table.add_row(" ".join(change["words"]), f"{change['needed_gib']:.1f}", fits, f"x {change['time']:.2f}", more)
    return table


def _effect(change: dict[str, Any]) -> str:
    more = f", {change['gpus']} GPUs" if change["kind"] == "gpus" else ""
    kind = f", {KINDS[change['kind']]}" if change["kind"] in ("format", "data", "result") else ""
    return f"{change['needed_gib']:.1f} GiB, time x {change['time']:.2f}{more}{kind}"


def _count(number: int) -> str:
    return f"{number:,}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
