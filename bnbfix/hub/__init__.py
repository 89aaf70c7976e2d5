"""The Hugging Face Hub: repos read by byte ranges, files downloaded, repairs pushed."""
