"""Chats about images: asks one question after the other and streams the answers.

python examples/chat.py Qwen/Qwen3-VL-2B-Instruct "What is in this image?" "And in the background?" --images dog.jpg

The first argument is a hub id, a Hugging Face folder, or an Orbax folder such as outputs/demo/checkpoint.
"""

import argparse

from convert import open_model
from liger_jax import Chat, GenerationOptions, Processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--images", nargs="*", default=[], help="images for the first question")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    options = GenerationOptions.from_hf(args.checkpoint, max_new_tokens=args.max_new_tokens)
    chat = Chat(open_model(args.checkpoint), Processor.from_pretrained(args.checkpoint), **vars(options))

    images = args.images
    for question in args.questions:  # each turn encodes only its own images and prefills only its own text
        print(f"> {question}")
        for piece in chat.stream(question, images=images):
            print(piece, end="", flush=True)
        print()
        images = []


if __name__ == "__main__":
    main()
