"""Full fine-tuning of text classifiers, in and out of domain."""
