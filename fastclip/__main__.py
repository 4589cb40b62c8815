"""python -m fastclip: prints how fastclip was built, and what runs on this machine."""

from pathlib import Path

import torch

import fastclip


def main():
    info = fastclip.build_info()
    cuda = f"CUDA {info['cuda']} for {', '.join(info['cuda_architectures'])}" if info["cuda"] else "no (CPU only)"
    if torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        gpu = "none that this torch can use"
    print(f"fastclip        {fastclip.__version__}")
    print(f"built against   torch {info['torch']}, {info['compiler']}")
    print(f"runs under      torch {torch.__version__}")
    print(f"CPU kernels     {info['cpu_capability']}, {torch.get_num_threads()} threads")
    print(f"CUDA kernels    {cuda}")
    print(f"GPUs here       {gpu}")
    folder = Path(fastclip.__file__).parent
    print(f"from C          {folder / 'include' / 'fastclip.h'}, {folder / 'libfastclip.so'}")


if __name__ == "__main__":
    main()
