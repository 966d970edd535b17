"""The example notebook runs from top to bottom, and what is committed was run."""

import dataclasses
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

NOTEBOOK = Path(__file__).parent.parent / "examples" / "walkthrough.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_runs_on_any_run(tmp_path, notebook):
    plan = SyntheticPlan()
    for index in range(2):
        write_planted_episode(tmp_path / "out", dataclasses.replace(plan, episode_index=index))
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"%matplotlib inline\nRUN = {str(tmp_path / 'out')!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 5
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_committed_notebook_was_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code if "parameters" not in cell.metadata.get("tags", [])[:1])
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    text = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "/home/" not in text
    assert "/root/" not in text
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert "trained in simulation" in notebook.cells[0].source
