"""What each line of a recipe is for; a line without a word here stops the build."""

WHY = {
    "model.name_or_path": (
        "The base, loaded in NF4 and never changed: its SHA-256 is taken before and after. A Hub id, a "
        "folder, or `bundled:NAME`."
    ),
    "model.revision": (
        "Branch, tag or commit. A commit makes the run repeatable; the summary records which one it was."
    ),
    "quantization.bnb_4bit_quant_type": (
        "NormalFloat4: 16 levels at the quantiles of a normal distribution, in blocks of 64 weights. FP4 is refused."
    ),
    "quantization.bnb_4bit_use_double_quant": "The blocks' scales are quantized as well: 0.37 bit a weight less.",
    "quantization.bnb_4bit_compute_dtype": (
        "What 4-bit weights are unpacked to for a product. `auto` goes by the card: bfloat16 from compute "
        "capability 8.0 on, float16 on a T4."
    ),
    "lora.r": "Rank of the update of each layer. Memory of adapter, gradients and optimizer grows with it.",
    "lora.lora_alpha": (
        "The update is scaled by `lora_alpha / r`. Change both, or the learning rate means another thing."
    ),
    "lora.lora_dropout": (
        "On the input of each adapter, while training; keyed by seed and step, so that a resume draws the same masks."
    ),
    "lora.target_modules": "Every linear layer but the output. QLoRA needed all of them to reach full fine-tuning.",
    "neftune.noise_alpha": "Strength of the noise. 0 or no section: none, bit for bit ([the noise](noise.md)).",
    "neftune.distribution": "Of one component. `gaussian` is the paper's ablation, with sqrt(3) times the norm.",
    "neftune.schedule": "The paper holds alpha constant. `linear` and `cosine` are for experiments.",
    "data.path": "Rows: a file, a glob, a Hub dataset, or a mixture ([data](data.md)).",
    "data.split": "Of a Hub dataset, or a slice of any source, such as `train[:1000]`.",
    "data.format": "Which columns hold what. `auto` finds it by the columns.",
    "data.prompt_template": "The text around a row; the same one is put around your prompts later.",
    "data.max_length": (
        "In tokens, template included. Longer rows are cut, with their end token kept; conversations are "
        "split on turn boundaries."
    ),
    "train.effective_batch_size": (
        "Sequences in one optimizer step. The machine decides how they are split; that changes nothing but rounding."
    ),
    "train.num_train_epochs": "Passes over the rows.",
    "train.learning_rate": "Of each step. It belongs to the effective batch: change one, think about the other.",
    "train.lr_scheduler_type": (
        "`constant` has no warm-up; `warmup_steps` beside it is refused, since it would do nothing."
    ),
    "train.optim": "AdamW with 32-bit states that may be paged to the host when the card is full.",
    "train.weight_decay": "Times the learning rate, taken off each step.",
    "train.adam_beta1": "Decay of the mean of gradients.",
    "train.adam_beta2": "Decay of the mean of their squares.",
    "train.max_grad_norm": "Gradients longer than this are shortened to it.",
    "train.seed": (
        "Of order, dropout, noise and the start of LoRA, each keyed by itself: changing one thing moves no other."
    ),
    "machine": (
        "`machine: {}` leaves how it is run to the planner: precision, micro-batch, checkpointing. Nothing in "
        "this section changes what is learned; it may differ on another machine or after a resume ([does it "
        "fit?](fit.md))."
    ),
}
