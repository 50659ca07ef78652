"""SAELens' own runner with its own checkpoints: the rival of benchmarks/torture_saelens.py, in its environment.

    ENVIRONMENT/bin/python benchmarks/saelens_resume.py

Each line of standard input orders one start of a run, as JSON: `folder` of the run, its `journal`, the checkpoint to
`resume` from or null, `die_at` (see benchmarks/journal.py), `shuffled` (its default, or no mixing and no buffer beyond
a batch), `model` folder, `contexts` (a JSON file of token ids [N, S]) and `sizes`. The answer is the process's number
and, when it has ended, a second line with its exit code. Shapes: N contexts, S positions, B batch, D model width.
"""

import hashlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets  # noqa: E402
import torch  # noqa: E402
from sae_lens import (  # noqa: E402
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    __version__,
)
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoTokenizer, GPTNeoXForCausalLM  # noqa: E402, F401

from benchmarks.journal import Journal  # noqa: E402


def config(order: dict[str, Any]) -> LanguageModelSAERunnerConfig[BatchTopKTrainingSAEConfig]:
    """A run of SAELens; where the order does not say, its defaults."""
    sizes, folder = order["sizes"], Path(order["folder"])
    batch_contexts = sizes["batch"] // sizes["context"]
    buffer = {"n_batches_in_buffer": sizes["buffer"] // sizes["context"]}
    if not order["shuffled"]:
        buffer = {"n_batches_in_buffer": batch_contexts, "activations_mixing_fraction": 0.0}
    return LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=sizes["width"], d_sae=sizes["latents"], k=sizes["k"]),
        model_name=order["model"],
        model_class_name="AutoModelForCausalLM",
        hook_name=f"gpt_neox.layers.{sizes['layer']}",
        context_size=sizes["context"],
        store_batch_size_prompts=batch_contexts,
        train_batch_size_tokens=sizes["batch"],
        training_tokens=sizes["tokens"],
        lr=sizes["learning_rate"],
        prepend_bos=False,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=sizes["checkpoints"],
        checkpoint_path=str(folder / "checkpoints"),
        output_path=str(folder / "output"),
        resume_from_checkpoint=order["resume"],
        verbose=False,
        **buffer,
    )


def listen(journal: Journal, batch: int) -> None:
    """Have the run tell its journal. A row is named by the tokens that it comes from, up to its own."""
    names: dict[bytes, str] = {}
    produce, fit, step, save = (
        ActivationsStore.get_raw_llm_batch,
        SAETrainer.fit,
        SAETrainer.step,
        SAETrainer.save_checkpoint,
    )

    def produced(self: ActivationsStore, *given: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        acts_ND, tokens_N = produce(self, *given, **named)
        assert tokens_N is not None
        for context, acts_SD in enumerate(acts_ND.split(self.context_size)):
            prefix = hashlib.sha256()
            for place, row_D in enumerate(acts_SD):
                prefix.update(f"{tokens_N[context * self.context_size + place]} ".encode())
                name = prefix.hexdigest()[:12]
                assert names.setdefault(row_D.numpy().tobytes(), name) == name, "two rows are alike"
        return acts_ND, tokens_N

    def fitted(self: SAETrainer[Any, Any]) -> Any:
        moments = list(self.optimizer.state.values())
        adam = int(moments[0]["step"]) if moments else 0
        journal.begin(self.n_training_samples // batch, counter=self.n_training_steps, adam=adam)
        return fit(self)

    def stepped(self: SAETrainer[Any, Any], acts_BD: Tensor) -> Any:
        output = step(self, acts_BD)
        journal.stepped([names[row_D.numpy().tobytes()] for row_D in acts_BD])
        return output

    def saved(self: SAETrainer[Any, Any], *given: Any, **named: Any) -> None:
        with journal.saving(self.n_training_samples // batch):
            save(self, *given, **named)

    ActivationsStore.get_raw_llm_batch, SAETrainer.fit = produced, fitted
    SAETrainer.step, SAETrainer.save_checkpoint = stepped, saved


def train(order: dict[str, Any]) -> None:
    """One start, from a checkpoint or from nothing, always seeded alike: SAELens' runner seeds nothing itself."""
    folder = Path(order["folder"])
    listen(Journal(Path(order["journal"]), folder, order["die_at"]), order["sizes"]["batch"])
    rows = json.loads(Path(order["contexts"]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    text = datasets.Dataset.from_dict({"input_ids": rows})
    LanguageModelSAETrainingRunner(config(order), override_dataset=text).run()


def start(order: dict[str, Any]) -> int:
    """A run in a process of its own; returns its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        with open(Path(order["folder"]) / "said.txt", "a", encoding="utf-8") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        train(order)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Start what is ordered."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(__version__, flush=True)
    for line in sys.stdin:
        child = start(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
