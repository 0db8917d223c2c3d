"""Whether the model that ships draws what it is told: a judge, figures and sheets."""
