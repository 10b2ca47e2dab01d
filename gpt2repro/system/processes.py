"""What a process that we start is told: where things are on this machine, and no secrets."""

import os
import re

# By allow-list: what is forgotten here costs a setting, what a list of secrets forgets is a secret.
# Hence no HF_TOKEN, no AWS_*, WANDB_*, NVIDIA_API_KEY, no proxies, which hold passwords.
PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TERM|TMPDIR|XDG_CACHE_HOME"
    r"|PYTHON[A-Z0-9]+|VIRTUAL_ENV|CONDA_PREFIX|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|NIX_LD(_LIBRARY_PATH)?|DYLD_(FALLBACK_)?LIBRARY_PATH"
    r"|(OMP|GOMP|MKL|KMP|OPENBLAS|CUDA|HIP|ROCR|HSA|TORCHINDUCTOR|TRITON)_\w+"
    r"|CUBLAS_WORKSPACE_CONFIG|ATEN_CPU_CAPABILITY|(ONEDNN|DNNL)_MAX_CPU_ISA|USE_(TF|TORCH)"
    r"|TORCH_DEVICE_BACKEND_AUTOLOAD"
    r"|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES|TF32_OVERRIDE)|TOKENIZERS_PARALLELISM"
    r"|HF_(HOME|HUB_CACHE|MODULES_CACHE|DATASETS_CACHE|ENDPOINT|HUB_OFFLINE|DATASETS_OFFLINE)"
    r"|HF_HUB_(DISABLE_TELEMETRY|ETAG_TIMEOUT|DOWNLOAD_TIMEOUT)|TRANSFORMERS_OFFLINE"
)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that we start: what `PASSED_ON` names of ours, and `more`."""
    return {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)} | more
