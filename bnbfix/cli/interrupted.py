"""What a command that was interrupted has to say."""


class Interrupted(Exception):
    """Raised in place of KeyboardInterrupt, which the option parser catches."""

    def __init__(self, words: str = "interrupted", hint: str | None = None) -> None:
        super().__init__(words)
        self.hint = hint
