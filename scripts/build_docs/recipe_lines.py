"""The purpose of each line of a recipe; a line that is missing here stops the build."""

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
    "quantization.bnb_4bit_use_double_quant": "The blocks' scales are quantized too, which saves 0.37 bits per weight.",
    "quantization.bnb_4bit_compute_dtype": (
        "The dtype 4-bit weights are unpacked to for a product. `auto` depends on the card: bfloat16 from compute "
        "capability 8.0 up, float16 on a T4."
    ),
    "lora.r": "Rank of each layer's update. The memory of adapter, gradients and optimizer grows with it.",
    "lora.lora_alpha": (
        "The update is scaled by `lora_alpha / r`. Change both, or the learning rate means something else "
        "([scale and rates](#scale-and-rates-of-lora))."
    ),
    "lora.lora_dropout": (
        "Dropout on the input of each adapter, while training; keyed by seed and step, so that a "
        "resumed run draws the same masks."
    ),
    "lora.target_modules": (
        "Every linear layer except the output and routers, experts included ([what that takes, by "
        "family](experts.md#what-all-linear-takes)). QLoRA needed all of them to match full fine-tuning."
    ),
    "neftune.noise_alpha": "Strength of the noise. 0 or no section: none, bit for bit ([the noise](noise.md)).",
    "neftune.distribution": "Of one component. `gaussian` is the paper's ablation, with sqrt(3) times the norm.",
    "neftune.schedule": "The paper keeps alpha constant. `linear` and `cosine` are ours, for experiments.",
    "data.path": "Rows: a file, a glob, a Hub dataset, or a mixture ([data](data.md)).",
    "data.split": "Split of a Hub dataset, or a slice of any source, such as `train[:1000]`.",
    "data.format": "How the columns are read. `auto` recognizes the format by the columns.",
    "data.prompt_template": "The text around a row; later your prompts get the same.",
    "data.max_length": (
        "Tokens per sequence, template included. Longer rows are cut, keeping their end token; conversations are "
        "split at turn boundaries."
    ),
    "train.effective_batch_size": (
        "Sequences per optimizer step. The machine decides how they are split, which changes nothing but rounding."
    ),
    "train.num_train_epochs": "Passes over the rows.",
    "train.learning_rate": "Peak of the schedule. It goes with the effective batch: change one, reconsider the other.",
    "train.lr_scheduler_type": (
        "`constant` has no warm-up; `warmup_steps` beside it is refused, since it would do nothing."
    ),
    "train.optim": "AdamW with 32-bit states, which may be paged to the host when the card is full.",
    "train.weight_decay": "Decoupled weight decay; each step subtracts it times the learning rate.",
    "train.adam_beta1": "Decay rate of the mean of the gradients.",
    "train.adam_beta2": "Decay rate of the mean of their squares.",
    "train.max_grad_norm": "Gradients with a larger L2 norm are scaled down to it.",
    "train.seed": (
        "Seed of row order, dropout, noise and LoRA's initial weights, each keyed separately: changing one "
        "leaves the others as they are."
    ),
    "machine": (
        "`machine: {}` leaves how the run is carried out to the planner: precision, micro-batch, checkpointing. "
        "Nothing in this section changes what is learned; it may differ on another machine or after a resume ([does it "
        "fit?](fit.md))."
    ),
}
