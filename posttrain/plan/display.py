"""Print a plan on the terminal."""

from collections.abc import Iterator
from typing import IO, Any

from rich.markup import escape
from rich.table import Table

from posttrain.plan.memory import FRAGMENTATION
from posttrain.utils.consoles import Console
from posttrain.utils.durations import format_duration

# What a change of a kind costs besides time; see posttrain.plan.advice.Edit.
KINDS = {
    "speed": "",
    "state": "16-bit state",
    "format": "8-bit products",
    "data": "shorter sequences",
    "result": "different training",
}
UNLIMITED = 10_000  # characters of a line
NARROW = 72  # below so many nothing has a line of its own
# Part of the memory -> key of its details.
DETAILS = {"activations": "layer", "logits and loss": "loss"}


def print_plan(plan: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print what `posttrain.plan.report.build_plan` returns."""
    console = Console(highlight=False, file=file)
    parameters = plan["parameters"]
    trained = parameters["trainable"]
    console.print(
        f"[bold]{escape(plan['model'])}[/]  {parameters['model']:,} parameters, "
        f"{trained:,} trained ({trained / parameters['total']:.2%})"
    )
    console.print(_gpus(plan))
    if plan["auto"]:
        console.print(plan["auto"])
    for line in _verdict(plan):
        console.print(line)
    if plan["settings_not_counted"]:
        console.print(f"[yellow]not counted[/] in memory and time: {', '.join(plan['settings_not_counted'])}")
    if plan["layouts"]:
        console.print(_layout_table(plan, console))
    elif plan["changes"]:
        console.print(_change_table(plan["changes"], console))
    as_asked = ""
    if not plan["fits"]:
        as_asked = " as asked"
    console.print(_memory_table(plan["memory_gib"], f"Memory per GPU{as_asked}, GiB"))
    console.print(_run_table(plan, f"time{as_asked}"))
    for name, decision in plan["decisions"].items():
        console.print(f"{name}: {decision}")


def _verdict(plan: dict[str, Any]) -> Iterator[str]:
    """Whether it fits, how long it takes, and where it doesn't fit what to type."""
    needed, available = plan["memory_gib"]["needed"], plan["gpu"]["memory_gib"]
    speed = plan["speed"]
    if plan["fits"]:
        line = f"[bold green]fits[/]: {needed:.1f} of {available:g} GiB"
        if speed["step_s"]:
            line += f"; {speed['step_s']:.2f} s a step"
        if speed["step_s"] and speed["total_s"] is not None:
            line += f", {format_duration(speed['total_s'])} in all"
        yield line
        if plan["memory_gib"]["host"]:
            yield _host(plan)
        if plan["gpu"]["assumed"]:
            name = plan["gpu"]["name"]
            yield f"[yellow]on an assumed {name}, not on this machine, which has no GPU[/]: a CPU is far slower"
        return
    line = f"[bold red]does not fit[/]: needs {needed:.1f} GiB, {available:g} GiB available"
    host, room = plan["memory_gib"]["host"], plan["gpu"]["host_room_gib"]
    if room is not None and host > room:
        line += f"; {_host(plan)}"
    yield line
    best = plan["cheapest_change"]
    if plan["layouts"]:
        fastest = plan["layouts"][0]
        line = f"fastest that fits: add [bold]{' '.join(fastest['overrides'])}[/]  {_gib(fastest)}"
        if fastest["step_s"] is not None:
            line += f", {fastest['step_s']:.2f} s a step"
        yield line
    elif best:
        yield f"cheapest change that fits: add [bold]{' '.join(best['overrides'])}[/]  {_effect(best)}"
        yield "cheapest: changes the training least, then needs the fewest GPUs, then takes the least time"
    else:
        yield "no combination of changes makes it fit on these GPUs"


def _host(plan: dict[str, Any]) -> str:
    """What activations need of the host's memory, and what they may have."""
    gpu, needed = plan["gpu"], plan["memory_gib"]["host"]
    line = f"of the host's memory {needed:.1f} GiB for each GPU's activations"
    if gpu["on_each_machine"] > 1:
        line += f" ({needed * gpu['on_each_machine']:.0f} on each machine)"
    if gpu["host_room_gib"] is not None:
        line += f", which may have {gpu['host_room_gib']:.1f}"
        if gpu["on_each_machine"] > 1:
            line += " for each GPU"
        if gpu["host_assumed"]:
            line += ", as is assumed: plan.host_memory_gib says what a machine has"
    return line


def _gpus(plan: dict[str, Any]) -> str:
    gpu = plan["gpu"]
    line = f"{gpu['count']} x {gpu['name']}"
    if gpu["assumed"]:
        line += " (assumed: plan.gpu=...)"
    if gpu["idle"]:
        line += f" ({gpu['idle']} more of each machine idle: parallelism.nproc_per_node={gpu['on_each_machine']})"
    line += f", {gpu['memory_gib']:g} GiB, "
    if gpu["bf16_tflops"]:
        line += f"{gpu['bf16_tflops']:g} TFLOP/s in bf16"
    else:
        line += "rate not known in bf16"
    sizes = [f"{name} {size}" for name, size in plan["layout"].items() if size > 1]
    if plan["stage_layers"]:
        sizes.append(f"layers of the stages {'+'.join(map(str, plan['stage_layers']))}")
    if sizes:
        line += f"; parallel: {', '.join(sizes)}"
    return line


def _memory_table(memory: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("of which", style="dim")
    for name, size in memory["parts"].items():
        detail = ""
        if name in DETAILS:
            terms = memory["detail"][DETAILS[name]]
            largest = sorted(terms, key=terms.get, reverse=True)[:4]
            detail = ", ".join(f"{term} {terms[term]:.3f}" for term in largest)
        if name == "activations":
            detail = f"a layer: {detail}"
        table.add_row(name, f"{size:.2f}", detail)
    table.add_row(
        "[bold]peak[/]",
        f"[bold]{memory['peak']:.2f}[/]",
        "what summary.json reports as peak_memory_gib",
    )
    table.add_row("outside", f"{memory['outside']:.2f}", "CUDA context, NCCL")
    fragmentation = f"with {100 * FRAGMENTATION:g} % of fragmentation"
    table.add_row("[bold]needed[/]", f"[bold]{memory['needed']:.2f}[/]", fragmentation)
    if memory["host"]:
        table.add_row("host", f"{memory['host']:.2f}", "of the host's memory: activations of trainer.offload_layers")
    return table


def _run_table(plan: dict[str, Any], time_title: str) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("data", _data(plan["data"]))
    if plan["sizes_on_this_cpu"]:
        sizes = " ".join(plan["sizes_on_this_cpu"])
        table.add_row("", f"a run on this machine, a CPU, takes {sizes} unless they are given, as preview shows")
    tokens = f"{plan['tokens_per_step']:,} tokens"
    steps = f"not known, each of {tokens}: set trainer.max_steps"
    if plan["steps"] is not None:
        steps = f"{plan['steps']:,} of {tokens}"
    if plan["epoch"]:
        steps += f": {plan['epoch']['passes']:.2f} epochs of {plan['epoch']['text']}"
    table.add_row("steps", steps)
    if plan["learning_rate"]:
        table.add_row("rate", plan["learning_rate"])
    speed = plan["speed"]
    if speed["step_s"]:
        time = f"{speed['step_s']:.2f} s a step, {speed['tokens_per_second']:,} tokens/s, MFU {speed['mfu']:.0%}"
        if speed["total_s"] is not None:
            time += f", {format_duration(speed['total_s'])} in all"
        table.add_row(time_title, time)
        table.add_row(
            "",
            f"[dim]limited by {speed['bound']}; from rates measured on H200s; without start and validation; MFU of the "
            "peak in bf16[/]",
        )
    return table


def _data(data: dict[str, Any]) -> str:
    if "not_counted" in data:
        return f"not counted: {escape(data['not_counted'])}; all tokens taken as supervised"
    sampled = ""
    if not data["all_read"]:
        sampled = f" (by the first {data['read']:,})"
    return (
        f"{data['conversations']:,} conversations{sampled}, {data['tokens']:,} tokens, "
        f"{data['supervised_tokens'] / data['tokens']:.0%} supervised, {data['rows']:,} sequences"
    )


def _change_table(changes: list[dict[str, Any]], console: Console) -> Table:
    table = Table(title="One change", title_justify="left")
    table.add_column("overrides", overflow="fold")
    table.add_column("GiB", justify="right", overflow="fold")
    table.add_column("fits", overflow="fold")
    table.add_column("time", justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for change in changes:
        table.add_row(
            " ".join(change["overrides"]),
            f"{change['needed_gib']:.1f}",
            "[green]yes[/]" if change["fits"] else "[red]no[/]",
            f"x {change['time']:.2f}",
            _kind(change),
        )
    _fit(table, changes, console)
    return table


def _fit(table: Table, entries: list[dict[str, Any]], console: Console) -> None:
    """Have a table that is too wide take its last column's lines for it: no override is divided up to half the width.

    Args:
        table: complete; its first column has overrides.
        entries: whose overrides these are.
        console: where it is printed.
    """
    unlimited = console.options.update(width=UNLIMITED)
    excess = console.measure(table, options=unlimited).maximum - console.width
    if excess <= 0 or console.width < NARROW:
        return
    longest = widest = 0
    for entry in entries:
        longest = max(longest, len(" ".join(entry["overrides"])))
        widest = max([widest, *map(len, entry["overrides"])])
    table.columns[0].width = max(longest - excess, min(widest, console.width // 2))


def _layout_table(plan: dict[str, Any], console: Console) -> Table:
    """What fits on the GPUs, with the overrides to add."""
    gpu = plan["gpu"]
    table = Table(title=f"Fits on {gpu['count']} x {gpu['name']}, fastest first", title_justify="left")
    table.add_column("overrides to add", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column("s a step", justify="right")
    table.add_column("", overflow="fold")
    for layout in plan["layouts"]:
        step_s = layout["step_s"]
        table.add_row(
            " ".join(layout["overrides"]) or "none: as asked",
            f"{layout['needed_gib']:.1f}",
            "" if step_s is None else f"{step_s:.2f}",
            _remark(layout),
        )
    _fit(table, plan["layouts"], console)
    return table


def _remark(layout: dict[str, Any]) -> str:
    """What a layout has besides its overrides."""
    remarks = []
    if layout["eight_bit_weights"]:
        remarks.append("frozen weights in 8 bits")
    if layout["host_gib"]:
        remarks.append(f"{layout['host_gib']:.0f} GiB of the host's memory")
    return ", ".join(remarks)


def _kind(change: dict[str, Any]) -> str:
    """What a change costs besides time."""
    if change["kind"] == "gpus":
        return f"{change['gpus']} GPUs"
    return KINDS[change["kind"]]


def _effect(change: dict[str, Any]) -> str:
    effect = f"{_gib(change)}, time x {change['time']:.2f}"
    kind = _kind(change)
    return f"{effect}, {kind}" if kind else effect


def _gib(entry: dict[str, Any]) -> str:
    """The memory of a layout or a change."""
    memory = f"{entry['needed_gib']:.1f} GiB"
    if entry["host_gib"]:
        memory += f" and {entry['host_gib']:.0f} of the host's for each GPU"
    return memory
