"""What `fp4export --help` says before the options."""

from __future__ import annotations

ABOUT = """Turn a diffusion transformer into a low-bit engine, with one command.

RECIPE is a YAML file or the name of a shipped recipe (digits, pixart_alpha_w4a6, pixart_alpha_256_w4a6,
pixart_alpha_1024_w4a6, pixart_sigma_w4a6, hunyuan_dit_v1_1_w4a6, hunyuan_dit_v1_2_w4a6, dit_xl_2_256_w4a6,
dit_xl_2_512_w4a6; with FP4DiT's published settings pixart_alpha_w4a6_fp4dit, pixart_sigma_w4a6_fp4dit,
hunyuan_dit_v1_2_w4a6_fp4dit). MODEL.onnx is a plain ONNX model, whose linear layers are rounded to nearest, or a graph
that fp4export exported. The suffix of OUT decides what is made: .onnx runs in stock ONNX Runtime; .plan and .engine are
TensorRT engines for the GPU that is here, or for the one that --target names; .bundle is a folder with everything that
devices need to build and check engines.

\b
Examples:
  fp4export digits -o digits.onnx
  fp4export my.yaml -o my.plan --target rtx-sm89
  fp4export my.yaml -o my.onnx --set calibration.steps=10 --set layers.0.weight=e3m0
  fp4export my.yaml -o my.plan --set compute=fp16
  fp4export my.yaml -o my.plan --dry-run
  fp4export my.yaml -o my.bundle --target orin,h100,cpu
  torchrun --nproc-per-node 8 -m exporter my.yaml -o my.plan    (calibrates with eight processes)
  fp4export model.onnx --format e2m1 -o small.onnx --keep "*.to_k"
  fp4export embed pixart_alpha_w4a6 --prompts captions.txt -o prompts.safetensors
  fp4export validate digits.onnx
  fp4export inspect digits.onnx
  fp4export bisect digits.onnx
  fp4export ranges my.yaml -o my.plan
  fp4export sample digits.onnx -o digits.png --compare
  fp4export evaluate digits.onnx --prompts recipes/digits/prompts.safetensors -o quality
  fp4export build my.work/lowered.orin.onnx -o my.plan --target orin    (on the Orin)
  fp4export doctor

\b
Targets:
  auto           cpu for .onnx; for .plan the GPU that is here, else rtx-sm89
  cpu            ONNX Runtime
  TensorRT-RTX   rtx-sm75 rtx-sm80 rtx-sm86 rtx-sm89 rtx-sm120 rtx-sm121 (built without a GPU)
  TensorRT       orin l4 h100 h200 b200 thor (built on the device)

\b
Beside OUT (here NAME.onnx) it writes
  NAME.report.html   samples, noise-prediction SNR, every layer, sizes, times (of the NAME made last)
  NAME.metrics.json  the same figures for programs
  NAME.recipe.yaml   the recipe with every default filled in
  NAME.work/         finished stages and blocks: a second run goes on from them, also after Ctrl-C or a crash;
                     another recipe is refused while a calibration there is unfinished (--fresh, --work-dir)
  OUT.origin.json    where `fp4export validate OUT` finds the reference

\b
Exit codes:
  0    done
  1    a defect of fp4export itself; please report it
  2    bad input: recipe, file or flag
  3    this machine lacks something (a package, a GPU, a network); finished stages are kept
  4    the validation failed; the first deviating layer is named
  130  interrupted; an export's finished stages and evaluate's images are kept
"""

OTHER_FORMS = (
    "MODEL.onnx --format FORMAT -o OUT [OPTIONS]",
    "embed RECIPE|MODEL_DIR --prompts FILE -o OUT",
    "sample OUT -o DIR",
    "evaluate OUT --prompts FILE -o DIR",
    "build MODEL.onnx -o OUT [OPTIONS]",
    "validate FILE",
    "inspect FILE [--json]",
    "bisect FILE [--json]",
    "ranges RECIPE -o OUT [OPTIONS]",
    "doctor [--json]",
)
"""What can be said instead of RECIPE -o OUT."""
