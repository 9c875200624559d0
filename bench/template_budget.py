"""Rows that a chat template renders per second of CPU: `python bench/template_budget.py [TREE]`.

TREE is another checkout of this project, whose code is measured beside this one's in turns, each time in a process of
its own; the best of five counts.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ("chatml", "llama3", "mistral")
RUN = """
import random, sys, time
sys.path.insert(0, "tests/data")
from omegaconf import OmegaConf
from tiny_tokenizer import byte_tokenizer
from posttrain.data.conversation import Conversation, Message
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
random.seed(0)
words = [f"word{i}" for i in range(500)]
text = lambda: " ".join(random.choices(words, k=random.randint(5, 80)))
rows = []
for _ in range(600):
    messages = [Message("system", text())]
    for _ in range(random.randint(1, 4)):
        messages += [Message("user", text()), Message("assistant", text())]
    rows.append(Conversation(messages))
for name in sys.argv[1:]:
    values = OmegaConf.to_container(OmegaConf.load(f"conf/template/{name}.yaml"))
    renderer = Renderer(ChatTemplate(name="x", jinja=values["jinja"], require_stop=False), byte_tokenizer())
    best = 0.0
    for _ in range(6):
        began = time.process_time()
        for row in rows:
            renderer.render(row)
        best = max(best, len(rows) / (time.process_time() - began))
    print(best)
"""


def measure(tree: Path) -> list[float]:
    """Rows per second of each template, in one process."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, *TEMPLATES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tree, env=environment)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    """Print a line for each template."""
    trees = [ROOT, *map(Path, sys.argv[1:])]
    found: dict[Path, list[list[float]]] = {tree: [] for tree in trees}
    for _ in range(5):
        for tree in trees:
            found[tree].append(measure(tree))
    for index, template in enumerate(TEMPLATES):
        best = [f"{tree.name} {max(run[index] for run in runs):,.0f} rows/s" for tree, runs in found.items()]
        print(f"{template}: {', '.join(best)}")


if __name__ == "__main__":
    main()
