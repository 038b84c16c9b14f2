from cnntrain.interruption import watching

if __name__ == "__main__":
    with watching("leave"):  # also while what the command needs is imported
        from cnntrain.commands.train import main

        main()
