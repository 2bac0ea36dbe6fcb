import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "examples"
FEW_DIGITS = """
import sys
sys.path[:0] = ["..", "../tests"]
import small
from sklearn import datasets
datasets.load_digits = small.load_few_digits
"""


def test_notebook_runs_and_shows_its_figures():
    """As it is, but with fewer images, seeds and epochs."""
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_epochs=3", "num_epochs=1").replace("(1, 2, 3)", "(1, 2)")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_DIGITS))
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}).execute()  # raises where a cell fails
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = [output["text"] for output in outputs if "| proposed " in output.get("text", "")]
    [of_a_gamma] = [text for text in texts if "| γ 0.3 " in text]
    assert of_a_gamma.count(" of 2 ") == 2
    [of_15_seeds] = [text for text in texts if "| 15 " in text]
    assert re.search(r"proposed +\| 15 +\| 98.78 .*\+0.71 to \+1.96.*\| 0.002 ", of_15_seeds)  # as in the README
