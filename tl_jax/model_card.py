def model_card(facts): return "card"
