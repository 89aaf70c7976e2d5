"""Uploads a model folder to the Hub, unless vLLM cannot load it.

python examples/upload.py FOLDER ORG/NAME [--vllm TARGET] [--private]
"""

from __future__ import annotations

import argparse
import sys

from huggingface_hub import HfApi

import bnbfix


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks a model folder, then uploads it.")
    parser.add_argument("folder")
    parser.add_argument("repo", help="where to: ORG/NAME")
    parser.add_argument("--vllm", default="portable", help="the vLLM release that it has to load in")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()

    try:
        bnbfix.check_before_upload(args.folder, vllm=args.vllm)
    except bnbfix.BnbfixError as e:
        sys.exit(f"not uploaded: {e}\n{e.hint or ''}\n{e.command or ''}".rstrip())
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    print(api.upload_folder(folder_path=args.folder, repo_id=args.repo, commit_message="Upload a checked model"))


if __name__ == "__main__":
    main()
