"""What `collective_rpc` reaches in each of vLLM's workers: versions of banks that come and go."""

from __future__ import annotations

from typing import Any

STEP_SECONDS = 0.02
"""How long a call may load rows while requests wait for their next step."""


class BankWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls` (see `engine_config.settle`).

    Nothing is raised: where one of several workers raises, vLLM leaves the answers of the others
    unread, and takes them for those of the next call.
    """

    get_model: Any

    def mmqwen_load_bank(self, number: int, fields: dict[str, str]) -> list[Any]:
        """Load some more of a version; see `ResidentBanks.advance`.

        Returns:
            Whether it is here, and what is wrong, or "".
        """
        try:
            return [self.get_model().load_bank(number, fields, STEP_SECONDS), ""]
        except Exception as error:
            return [False, f"{error}" if isinstance(error, ValueError) else f"{error!r:.500}"]

    def mmqwen_drop_bank(self, number: int) -> list[Any]:
        """Let a version go; answers as `mmqwen_load_bank`."""
        try:
            self.get_model().drop_bank(number)
        except Exception as error:
            return [False, f"{error!r:.500}"]
        return [True, ""]
