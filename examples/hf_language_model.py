"""A small language model by Hugging Face's Trainer, on the Markdown files of a folder: python hf_language_model.py

It trains twice on the same batches, without the last-batch term (alpha 0) and with it, and prints both perplexities on
held-out text. `--data FOLDER`, `--resume`; options of TrainingArguments work as always. What differs from a plain
script is marked `# dlb`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from dlb_fast import LastBatchLoss
from dlb_fast.integrations.hf import LastBatchTrainer


@dataclass
class Arguments:
    data: str = str(Path(__file__).resolve().parent.parent / "docs")  # of this project
    vocabulary: int = 2048
    length: int = 64  # tokens of a sequence
    width: int = 96
    layers: int = 2
    alpha: float = 1.0
    temperature: float = 1.0
    resume: bool = False


def sequences(texts, tokenizer, length):
    """Pieces of one length. Labels are the tokens themselves; the end of a text is padded with -100, not trained on."""
    found = []
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            missing = length - len(piece)
            padded = piece + [tokenizer.eos_token_id] * missing
            found.append({"input_ids": padded, "labels": piece + [-100] * missing})
    return found


def perplexity(alpha, pieces, tokenizer, own, args):
    set_seed(args.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=own.length, n_embd=own.width, n_layer=own.layers, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    trainer = LastBatchTrainer(  # dlb: Trainer; it repeats sequences, each time with another dropout
        GPT2LMHeadModel(config),
        args,
        train_dataset=[piece for number, piece in enumerate(pieces) if number % 10],
        eval_dataset=pieces[::10],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        # dlb: the rows of the loss are tokens, and each keeps 64 of its logits for the next batch
        criterion=LastBatchLoss(len(tokenizer), keep="top_k", alpha=alpha, temperature=own.temperature),
        from_hidden=True,  # dlb: no logits of a whole batch in memory
    )
    found = Path(args.output_dir).exists() and get_last_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=(own.resume and found) or None)
    return math.exp(trainer.evaluate()["eval_loss"])


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="output/language_model",
        num_train_epochs=3,  # each shows every sequence twice
        per_device_train_batch_size=32,  # sequences per process, half of them repeated
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=20,
        report_to="none",
    )
    own, args = parser.parse_args_into_dataclasses()
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(own.data).glob("**/*.md"))]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, own.vocabulary, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    pieces = sequences(texts, tokenizer, own.length)
    folder = args.output_dir
    for alpha in (0.0, own.alpha):
        args.output_dir = f"{folder}/alpha-{alpha}"
        value = perplexity(alpha, pieces, tokenizer, own, args)
        if args.process_index == 0:
            print(f"alpha {alpha}: perplexity {value:.2f}")


if __name__ == "__main__":
    main()
