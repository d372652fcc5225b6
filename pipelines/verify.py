"""Stage verify: verified/<arm>/<seed>/verify.json, whether what is served is what was trained.

Always on llama.cpp in this process, in both modes; where an Ollama server answers, the model is registered there and
checked as well, against Hugging Face's answers and against llama.cpp's.
"""

import json
from pathlib import Path
from typing import Any

from export.engines import Backend
from export.errors import ExportError
from export.llama_engine import LlamaCpp
from export.ollama import resolve_host, server_version
from export.ollama_engine import OllamaServer
from export.registration import keep_registered
from export.serving import MODES, Served, base_file, served_in
from export.verdict import Checked, against
from export.verify import verify as verify_model
from export.verify_table import show
from pipelines.config import check_arm, for_text, load_params
from pipelines.outputs import staged
from pipelines.runinfo import RunRecord, hash_inputs, llama_cpp_device, write_json
from pipelines.schema import Params
from pipelines.stage import (
    BASE_ARM,
    ArmOption,
    FirstSeedOption,
    SeedOption,
    cli,
    gguf_dir,
    main_for,
    model_name,
    verified_dir,
)

GGUF = Path("gguf")


def row_of(row: Checked) -> dict[str, Any]:
    """One entry of verify.json's rows; prompts is 0, and the shares null, where a server cannot serve the mode."""
    return {
        "backend": row.backend,
        "backend_version": row.backend_version,
        "mode": row.mode,
        "prompts": row.prompts,
        "rendered": row.rendered,
        "counted": row.counted,
        "answered": row.answered,
        "equal_to_merged": row.equal_to_merged,
        "perturbed_noticed": row.perturbed_noticed,
        "first_difference": row.first,
        "gguf_sha256": row.gguf_sha256,
        "adapter_sha256": row.adapter_sha256,
        "server_digest": row.server_digest,
        "stored_sha256": row.stored_sha256,
    }


def backends(served: Served) -> list[Backend]:
    """llama.cpp, and the Ollama server at OLLAMA_HOST where one answers, with the model registered there.

    A model that the server has as base and adapter stays so; any other is registered merged.
    """
    found: list[Backend] = [LlamaCpp()]
    if server_version(resolve_host()) is None:
        return found
    server = OllamaServer()
    keep_registered(server.url, served, progress=print)
    return [*found, server]


def run(params: Params, arm: str, seed: int, first_seed: int = 0) -> None:
    """Verify one arm with one seed.

    Raises:
        ExportError: an answer, token or rendered prompt differs from training's; earlier results stay.
    """
    if arm != BASE_ARM:
        check_arm(arm, params)
    section = params.verify
    name = model_name(arm, seed, first_seed)
    served = served_in(gguf_dir(arm, seed), name)
    inputs = hash_inputs(gguf_dir(arm, seed), *([] if arm == BASE_ARM else [base_file(GGUF)]))
    out = verified_dir(arm, seed)
    failed = out.with_name(f"{out.name}.verify-failed.json")
    with staged(out) as folder:
        record = RunRecord(
            "verify",
            params={"verify": section.model_dump()},
            inputs=inputs,
            arm=arm,
            seed=seed,
            prompt_template=served.facts["template"],
            device=llama_cpp_device(),
        )
        rows: list[Checked] = []
        for backend in backends(served):
            checked = verify_model(backend, served, MODES, section.prompts, section.control_scale)
            rows += against(checked, rows)
        content = {"schema": 1, "arm": arm, "seed": seed, "model_name": name, "rows": [row_of(row) for row in rows]}
        show(rows)
        least = (section.min_answers_equal, section.min_answers_equal_quantized)
        if problems := [p for row in rows if (p := row.problem(*least))]:
            write_json(failed, content)
            raise ExportError(f"{out}: what is served is not what was trained ({failed}). {' '.join(problems)}")
        failed.unlink(missing_ok=True)
        write_json(folder / "verify.json", content)
        record.write(folder)
    print(json.dumps({"verified": name, "rows": len(rows), "backends": sorted({row.backend for row in rows})}))


def main(arm: ArmOption, seed: SeedOption = 0, first_seed: FirstSeedOption = 0) -> None:
    """Verify one arm with one seed."""
    main_for("verify", lambda: run(for_text(load_params(), "stage verify"), arm, seed, first_seed), arm, seed)


if __name__ == "__main__":
    cli(main)
