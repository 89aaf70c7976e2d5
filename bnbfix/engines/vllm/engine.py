"""vLLM as an engine."""

from __future__ import annotations

from ...models.family import Model
from ..engine import DEFAULT, Engine, Expectation, ReleaseRange, Target
from . import asked, recorded, releases


class Vllm:
    """Answers from the profiles and the release table, and from an installed vLLM that was asked."""

    name = DEFAULT
    command = ("vllm", "serve")

    @property
    def ranges(self) -> tuple[ReleaseRange, ...]:
        """The release table."""
        return releases.ranges()

    def expect(self, model: Model, release: ReleaseRange) -> Expectation | None:
        """What the model's profile says, or where there is none, the vLLM that was asked."""
        return recorded.expect(model, release) or asked.find_asked(model, release)

    def find_refusal(self, model: Model, release: ReleaseRange) -> str | None:
        """Why none of the releases loads the model's class under bitsandbytes."""
        return recorded.find_refusal(model, release)

    def serving_packages(self, target: Target) -> list[str]:
        """vLLM, and its plugin or an older transformers where it needs them."""
        return releases.serving_packages(target)


ENGINE: Engine = Vllm()
