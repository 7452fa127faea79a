"""Banks put into a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmqwen.banks import BankCatalog
from mmqwen.banks.file import facts_file, keys_file
from mmqwen.checkpoint.names import BANKS_FOLDER
from mmqwen.checkpoint.shards import place_file


def place_banks(catalog: BankCatalog, stage: Path, copy: bool) -> dict[str, dict[str, str]]:
    """Link or copy banks into a checkpoint's folder.

    Returns:
        What its config says of them: files relative to the folder.
    """
    (stage / BANKS_FOLDER).mkdir()
    fields = catalog.to_dict()
    for name, served in catalog.banks.items():
        file, target = served.bank.file.resolve(), stage / BANKS_FOLDER / f"{name}.bank"
        place_file(file, target, copy)
        if copy:
            shutil.copystat(file, target)  # what is known of it names its time
        for beside in (facts_file, keys_file):
            if beside(file).exists():
                shutil.copyfile(beside(file), beside(target))
        fields[name]["file"] = f"{BANKS_FOLDER}/{name}.bank"
    return fields
