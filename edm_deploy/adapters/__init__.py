"""Low-rank adapters from files: LoRA of diffusers, PEFT and kohya, LoHa and LoKr, in one form, and packed into the rank slots of an engine."""
