import subprocess
import sys


def test_erasure_without_its_cuda_part_never_imports_torch() -> None:
    modules = [
        "blocks",
        "gf256",
        "groups",
        "isal",
        "kernels",
        "lanes",
        "matrices",
        "redundancy",
        "reed_solomon",
        "report",
        "survival",
        "cuda",
    ]
    script = "import sys\n" + "\n".join(f"import holdfast.erasure.{name}" for name in modules)
    script += "\nfrom holdfast.erasure import ReedSolomon\nReedSolomon(2, 1)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
