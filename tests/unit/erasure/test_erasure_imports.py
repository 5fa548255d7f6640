import subprocess
import sys
from pathlib import Path

import holdfast.erasure


def test_erasure_without_its_cuda_part_never_imports_torch() -> None:
    files = sorted(path.stem for path in Path(holdfast.erasure.__path__[0]).glob("[!_]*.py"))
    assert {"cuda", "kernels", "groups"} <= set(files)
    script = "import sys\n" + "\n".join(f"import holdfast.erasure.{name}" for name in files)
    script += "\nfrom holdfast.erasure import ReedSolomon\nReedSolomon(2, 1)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
