"""Asks a model about an image and streams the answer.

python examples/ask_about_an_image.py Qwen/Qwen2-VL-2B-Instruct dog.jpg "What is in this image?"

The first argument is a hub id, a Hugging Face folder, or an Orbax folder such as outputs/demo/checkpoint.
"""

import argparse

from convert import open_model
from liger_jax import GenerationOptions, Processor, prepare, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("image")
    parser.add_argument("question", nargs="?", default="What is in this image?")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    model = open_model(args.checkpoint)
    processor = Processor.from_pretrained(args.checkpoint)
    options = GenerationOptions.from_hf(args.checkpoint, max_new_tokens=args.max_new_tokens)

    content = [{"type": "image", "image": args.image}, {"type": "text", "text": args.question}]
    inputs = processor([{"role": "user", "content": content}], add_generation_prompt=True)
    for piece in stream(model, prepare(model.config, **inputs), processor, **vars(options)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
