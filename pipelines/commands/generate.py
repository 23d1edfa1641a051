"""``adapt-pruner generate``: a reply of a checkpoint."""

from typing import Any

import click

from pipelines.commands.console import MODEL_HELP, example, local_checkpoint, prepare_for, printable


@click.command(
    epilog=example('adapt-pruner generate output/demo/model "What is the capital of France?"'),
    help="Generate a reply to PROMPT.\n\n"
    f"{MODEL_HELP}. With a chat template, the prompt is the user's message; otherwise MODEL continues it.",
)
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest reply."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token; higher values vary more.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for sampling.")
def generate(model: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Generate a reply."""
    prepare_for(model)

    import torch

    from core.model.build import load_model, load_tokenizer, pick_device
    from core.model.checkpoint import Checkpoint

    with local_checkpoint(model) as directory:
        device, checkpoint = pick_device(), Checkpoint(directory)
        network: Any = load_model(checkpoint, device=device)
        tokenizer = load_tokenizer(checkpoint)
        torch.manual_seed(seed)
        network.generate(
            **_prompt_tokens(tokenizer, prompt).to(device),
            max_new_tokens=max_new_tokens,
            streamer=printable_streamer(tokenizer),
            pad_token_id=tokenizer.eos_token_id,
            do_sample=temperature > 0,
            **({"temperature": temperature} if temperature else {}),
        )


def _prompt_tokens(tokenizer: Any, prompt: str) -> Any:
    from core.errors import CheckpointError
    from core.untrusted import foreign_errors

    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]

    def failed(said: str) -> CheckpointError:
        return CheckpointError(f"the chat template of MODEL fails: {said}. Correct or remove it.")

    with foreign_errors(failed):
        return tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


def printable_streamer(tokenizer: Any) -> Any:
    """Return what prints a reply as it comes, less anything that steers a terminal: a model may write all."""
    from transformers import TextStreamer

    class Printable(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep="\n\t"), stream_end)

    return Printable(tokenizer, skip_prompt=True, skip_special_tokens=True)
