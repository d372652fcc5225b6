"""Stage verify: verified/<arm>/<seed>/verify.json, whether what is served is what was trained.

It begins with the rows of the files themselves, which stage export compared with Hugging Face.
Always on llama.cpp in this process, in both modes, each prompt in several forms; where an Ollama server answers, the
model is registered there and checked as well, against Hugging Face's answers and against llama.cpp's.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from db.files import (
    exclusive,
    finish_run,
    hash_inputs,
    llama_cpp_device,
    read_record,
    staged,
    start_run,
    write_record,
)
from db.records import VerifyRecord
from export import ExportError
from export.engines.llama_cpp import open_in_process
from export.engines.ollama_engine import resolve_host, server_version
from export.proof import against, problems, show, verify_record
from export.proof import verify as verify_model
from export.register import keep_registered, open_on_server
from export.served import MODES, PARITY, base_file, served_in
from pipelines.params import Share, StageParams, check_arm
from pipelines.stage import BASE_ARM, SPEED_LOCK, command, gguf_dir, model_name, verified_dir
from trainers.settings import Positive, Section

GGUF = Path("gguf")


class Verify(Section):
    prompts: Positive
    min_answers_equal: Share
    min_answers_equal_quantized: Share
    control_scale: Annotated[float, Field(gt=0, description="factor on the adapter's scale in the control")]

    @field_validator("control_scale")
    @classmethod
    def _perturbs(cls, scale: float) -> float:
        if scale == 1.0:
            raise ValueError("expected another factor than 1, which perturbs nothing; 0.5 is a scale that is half lost")
        return scale


class Params(StageParams):
    verify: Verify


def run(params: Params, arm: str, seed: int) -> None:
    """Raises ExportError: an answer, token or rendered prompt differs from training's; earlier results stay."""
    if arm != BASE_ARM:
        check_arm(arm, params)
    section = params.verify
    name = model_name(arm, seed, params.first_seed)
    served = served_in(gguf_dir(arm, seed), name)
    inputs = hash_inputs(gguf_dir(arm, seed), *([] if arm == BASE_ARM else [base_file(GGUF)]))
    out = verified_dir(arm, seed)
    failed = out.with_name(f"{out.name}.verify-failed.json")
    with staged(out) as folder:
        record = start_run(
            "verify",
            params={"verify": section.model_dump()},
            inputs=inputs,
            arm=arm,
            seed=seed,
            prompt_template=served.serving.template,
            device=llama_cpp_device(),
        )
        how, host = (served, MODES, section.prompts, section.control_scale), resolve_host()
        rows = verify_model(open_in_process, *how)
        if server_version(host) is not None:
            with exclusive(SPEED_LOCK):
                # A model that the server has as base and adapter stays so; any other is registered merged.
                keep_registered(host, served)
                rows += against(verify_model(partial(open_on_server, host), *how), rows)
        parity = served.folder / PARITY
        of_files = read_record(parity, VerifyRecord).rows if parity.is_file() else []
        content = verify_record(arm, seed, name, [*of_files, *rows])
        show(rows)
        least = (section.min_answers_equal, section.min_answers_equal_quantized)
        if wrong := problems(rows, *least):
            write_record(failed, content)
            raise ExportError(f"{out}: what is served is not what was trained ({failed}). {' '.join(wrong)}")
        failed.unlink(missing_ok=True)
        write_record(folder / "verify.json", content)
        finish_run(record, folder)
    print(json.dumps({"verified": name, "rows": len(rows), "backends": sorted({row.backend for row in rows})}))


if __name__ == "__main__":
    command("verify", Params, run)
