"""The layout is the architecture: a file imports only files above it, and importing costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tqw

PACKAGE = Path(tqw.__file__).parent
# Reading order. A file may import only files before it.
ORDER = [
    "errors", "config", "rotation", "codebook", "packing", "scaling", "weight", "gptq", "checkpoint",
    "kernels.cpu", "kernels.gpu", "kernels.cuda_launch", "kernels.cuda_variant", "kernels.cuda_plan", "kernels.cuda",
    "kernels.triton_kernels", "kernels.triton",
    "kernels.cutile_kernels", "kernels.cutile", "kernels.reference", "kernels",
    "shared_input", "mixture", "layer", "model", "training",
    # the edge: nothing above imports it
    "gradients", "allocation", "calibrate", "moments", "propagation", "refine", "evaluate", "source", "pretrained",
    "generate", "peers", "bench", "footprint", "report", "compare", "demo", "integrations", "integrations.lm_eval",
    "cli", "integrations.serving", "integrations.transformers", "registration",
    "integrations.vllm_layers", "integrations.vllm", "integrations.sglang_layers", "integrations.sglang",
]  # fmt: skip


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tqw":
            module = node.module.removeprefix("tqw").removeprefix(".")
            for alias in node.names:
                full = f"{module}.{alias.name}" if module else alias.name
                found.add(full if full in ORDER else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("tqw.") for alias in node.names if alias.name.startswith("tqw.")}
    return found - {""}


def test_files_import_only_what_stands_above_them():
    files = {_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    assert sorted(files) == sorted(ORDER), "add a new file to ORDER, where it belongs"
    for name, path in files.items():
        below = [other for other in _imports(path) if ORDER.index(other) >= ORDER.index(name)]
        assert not below, f"{name} imports {below}"


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_lean():
    """No transformers, no CUDA context, and under a second beyond torch's own import."""
    code = (
        "import time, torch; start = time.perf_counter(); import tqw; tqw.QuantConfig, tqw.linear, tqw.quantize_model;"
        "spent = time.perf_counter() - start; import sys;"
        "print(spent < 1, 'transformers' in sys.modules, 'matplotlib' in sys.modules, torch.cuda.is_initialized())"
    )
    assert _run(code) == "True False False False"
    assert _run("import tqw, sys; print('torch' in sys.modules)") == "False"


def test_public_names_exist_and_are_few():
    assert len(tqw.__all__) <= 20
    for name in tqw.__all__:
        assert getattr(tqw, name) is not None
    assert set(tqw._HOME) == set(tqw.__all__)
