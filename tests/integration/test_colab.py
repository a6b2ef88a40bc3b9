"""The notebook for Colab runs from its first cell to its last, on a tiny model on a CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples/colab.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> nbformat.NotebookNode:
    """Every cell executed by a Jupyter kernel; only the values of the cell of parameters are
    others."""
    folder = tmp_path_factory.mktemp("colab")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    replaced = {
        "MODEL": str(tiny_folder), "DEVICE": "cpu", "COMPUTE_DTYPE": "fp32",
        "BASE_WEIGHTS": "fp32", "MAX_STEPS": 2,
    }  # fmt: skip
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = "\n".join(
        f"{name} = {replaced[name]!r}" if (name := line.partition(" = ")[0]) in replaced else line
        for line in parameters.source.splitlines()
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel(env=env):
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    return notebook


def said(notebook: nbformat.NotebookNode, word: str) -> str:
    """What the code cell that has `word` printed."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and word in c.source]
    return "".join(output.get("text", "") for output in cell.outputs)


def test_every_code_cell_ran(executed: nbformat.NotebookNode) -> None:
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:  # a command that fails does not stop a notebook
        shown = "".join(output.get("text", "") for output in cell.outputs)
        assert "error: " not in shown.lower(), shown
        assert "Traceback" not in shown, shown


def test_the_plan_is_of_a_t4_and_its_machine(executed: nbformat.NotebookNode) -> None:
    assert "NVIDIA T4 (not measured)" in said(executed, "llamaweft plan")
    shown = said(executed, "needs_of")
    assert "of 15.0 GiB" in shown
    assert "of 12.7 GiB" in shown


def test_it_ends_with_answers_and_an_archive(executed: nbformat.NotebookNode) -> None:
    assert "before: " in said(executed, "evaluation.json")
    assert '"' in said(executed, "llamaweft predict").strip().splitlines()[-1]
    assert said(executed, "make_archive").rstrip().endswith("adapter.zip")
