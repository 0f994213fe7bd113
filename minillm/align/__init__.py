"""Making a model do what is asked: fine-tuning on conversations."""

from minillm.align.sft import ConversationBatches, document, encode, first_fit, sft_loss, sft_rows

__all__ = ["ConversationBatches", "document", "encode", "first_fit", "sft_loss", "sft_rows"]
