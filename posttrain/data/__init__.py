"""Instruction and chat data: format -> conversations -> text, ids and mask -> packing -> dataset."""

from posttrain.data.sft import SFTData, Splits

__all__ = ["SFTData", "Splits"]
