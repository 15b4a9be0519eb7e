"""Fine-tune a checkpoint with MixLoRA, a mixture of LoRA experts, beside plain LoRA of equal size.

    python examples/finetune_mixlora.py                                  # needs no network
    python examples/finetune_mixlora.py --model PATH_OR_HUB_ID --text FILE...

Without --model a small Llama is first trained on English prose; without --text the target is
Python source of the standard library (demo_text.py says how both are split). Each arm trains in a
process of its own, on the same rows in the same order; the saved mixture is read back in a third.
"""

import json
import time
from dataclasses import asdict

import torch
from demo_model import heldout_loss, logits_of
from demo_report import (
    Result,
    TrainerBar,
    console,
    describe,
    peak_memory,
    results_table,
    verdict,
)
from demo_setup import Job, in_new_process, prepare
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import moeroute
from moeroute.methods import MixLoRA


def main() -> None:
    """Prepare, train both arms, compare, read the mixture back."""
    start = time.perf_counter()
    job = prepare(__doc__)
    mixture = MixLoRA(r=4, lora_alpha=8, num_experts=8, top_k=2, router_aux_loss_coef=0.01)
    lora = lora_of_equal_size(job, mixture)
    arms = [in_new_process(fine_tune, job, adapter) for adapter in (lora, mixture)]
    (job.out / "results.json").write_text(json.dumps([asdict(arm) for arm in arms], indent=2))
    console.print(results_table(arms, job.target))
    console.print(verdict(*arms, job.target))
    in_new_process(read_back, job)
    console.print(f"all of it took {time.perf_counter() - start:.0f} s")


def lora_of_equal_size(job: Job, mixture: MixLoRA) -> LoraConfig:
    """Plain LoRA on the linears that the mixture wraps, at the rank that matches its parameters."""
    model = moeroute.wrap_model(AutoModelForCausalLM.from_pretrained(job.base), mixture)
    linears = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".base_layer." in name
    }
    widths = sum(linear.in_features + linear.out_features for linear in linears.values())
    rank = round(model.num_parameters(only_trainable=True) / widths)
    scaling = mixture.lora_alpha / mixture.r
    return LoraConfig(
        r=rank, lora_alpha=scaling * rank, target_modules=list(linears), task_type="CAUSAL_LM"
    )


def fine_tune(job: Job, adapter: MixLoRA | LoraConfig) -> Result:
    """Train one arm with transformers' Trainer, measure it, save its adapter and some logits."""
    torch.manual_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.base)
    if isinstance(adapter, MixLoRA):
        name = "MixLoRA"
        model = moeroute.wrap_model(model, adapter, task_type="CAUSAL_LM")
        callbacks = [moeroute.RoutingCallback(), TrainerBar(name)]
    else:
        name = "LoRA"
        model = get_peft_model(model, adapter)
        callbacks = [TrainerBar(name)]
    arguments = TrainingArguments(
        output_dir=str(job.out / name.lower()),
        max_steps=job.steps,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rates[name],
        lr_scheduler_type="cosine",
        warmup_steps=job.steps // 10,
        logging_steps=min(10, job.steps),
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    rows = job.rows
    train_rows = [{"input_ids": row, "labels": row} for row in rows["target_train"]]
    trainer = Trainer(model, arguments, train_dataset=train_rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    before = [heldout_loss(model, rows[kind]) for kind in ("target", "prose")]
    memory_before = peak_memory()
    seconds = trainer.train().metrics["train_runtime"]
    memory_peak = peak_memory()
    after = [heldout_loss(model, rows[kind]) for kind in ("target", "prose")]
    model.save_pretrained(job.out / name.lower())
    torch.save(logits_of(model, rows["target"][:4]), job.out / f"{name.lower()}-logits.pt")
    return Result(
        name=name,
        adapter=describe(adapter),
        learning_rate=job.learning_rates[name],
        trainable_parameters=model.num_parameters(only_trainable=True),
        target=(before[0], after[0]),
        prose=(before[1], after[1]),
        tokens_per_second=job.steps * job.batch_size * rows["target"].shape[1] / seconds,
        memory_before=memory_before,
        memory_peak=memory_peak,
    )


def read_back(job: Job) -> None:
    """In a new process: load the saved mixture in two ways, compare logits, look at its routing."""
    folder, rows = job.out / "mixlora", job.rows
    trained = torch.load(job.out / "mixlora-logits.pt")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job.base), folder)
    loaded = {
        "PeftModel": model,
        "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained(folder),
    }
    for way, reloaded in loaded.items():
        difference = (logits_of(reloaded, rows["target"][:4]) - trained).abs().max().item()
        told = f"{way}.from_pretrained({folder}): logits differ by at most {difference:g}"
        console.print(told, soft_wrap=True)
    loads = {}
    for kind, title in {"target": job.target, "prose": "prose"}.items():
        with moeroute.track_routing(model) as stats:
            heldout_loss(model, rows[kind])
        console.print(f"\nRouting of held-out {title}:", stats.summary())
        stats.plot(job.out / f"routing-{kind}.png", title=f"MixLoRA's experts on {title}")
        loads[kind] = torch.stack([layer.load for layer in stats.layers])  # (layers, E)
    moved = (loads["target"] - loads["prose"]).abs().sum(dim=1) / 2
    console.print(f"share of slots routed elsewhere on prose: {moved.mean():.0%} (mean of layers)")
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    prompt = tokenizer(job.prompt, return_tensors="pt").to(model.device)
    torch.manual_seed(job.seed)
    written = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40)
    console.rule("generated")
    console.print(
        tokenizer.decode(written[0], skip_special_tokens=True), highlight=False, markup=False
    )


if __name__ == "__main__":
    main()
