"""Yuan 2.0 and its craft: configuration, tokenizer, data, planner, model, training, evaluation, serving."""
