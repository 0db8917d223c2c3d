// The form: pictures for the editors, the prompt, and keys. Loaded after studio.js.
{
  // --- a picture for an editor ------------------------------------------------------------------

  const MAX_SIDE = 2048;  // the most that can be drawn; a phone's photo would take a minute

  const fitting = async file => {
    const whole = await createImageBitmap(file);
    const scale = MAX_SIDE / Math.max(whole.width, whole.height);
    if (scale >= 1) return file;
    const canvas = new OffscreenCanvas(Math.round(whole.width * scale), Math.round(whole.height * scale));
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    return new File([await canvas.convertToBlob()], "picture.png", {type: "image/png"});
  };

  const START = 60_000;  // milliseconds that the editor is given to start

  // Gradio's editor loses a picture that arrives before both of its canvases are there.
  const started = async easel => {
    const until = performance.now() + START;
    while (easel.querySelectorAll("canvas").length < 2) {
      if (performance.now() > until) return false;
      await new Promise(resolve => setTimeout(resolve, 50));
    }
    return true;
  };

  const hand = async (input, file) => {
    const easel = input.closest(".easel");
    const tell = textContent => easel.before(
      safelight.make("p", {className: "problem unread", role: "alert", textContent}));
    easel.parentElement.querySelector(".unread")?.remove();
    const files = new DataTransfer();
    try {
      files.items.add(await fitting(file));
    } catch {
      tell(`This browser cannot read “${file.name}” as a picture.`);
      return;
    }
    if (!await started(easel)) {
      tell("The editor has not started. It needs a browser with WebGL.");
      return;
    }
    input.files = files.files;
    input.dataset.fits = "yes";
    input.dispatchEvent(new Event("change", {bubbles: true}));
  };

  addEventListener("change", event => {
    const input = event.target;
    if (!input.matches?.(".easel input[type=file]") || !input.files.length) return;
    if (input.dataset.fits) { delete input.dataset.fits; return; }
    event.stopImmediatePropagation();
    hand(input, input.files[0]);
  }, true);

  addEventListener("drop", event => {
    const input = event.target.closest?.(".easel")?.querySelector("input[type=file]");
    const file = event.dataTransfer?.files[0];
    if (!input || !file) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
    hand(input, file);
  }, true);

  // Gradio's gallery has a button inside of one that does nothing: that one is taken away from
  // those who use a screen reader or the keyboard.
  new MutationObserver(() => {
    for (const outer of document.querySelectorAll("#references button:not([role]):has(button)")) {
      outer.setAttribute("role", "group");
      outer.tabIndex = -1;
    }
  }).observe(document, {childList: true, subtree: true});

  // --- prompt and keys --------------------------------------------------------------------------

  // Gradio reloads the page when the server returns; the prompt is kept.
  const typed = () => {
    const prompt = document.querySelector("#prompt textarea");
    if (!prompt) { setTimeout(typed, 50); return; }
    if (!prompt.value) {
      prompt.value = sessionStorage.getItem("prompt") ?? "";
      prompt.dispatchEvent(new Event("input", {bubbles: true}));
    }
    const keep = () => sessionStorage.setItem("prompt", prompt.value);
    prompt.addEventListener("input", keep);
    addEventListener("pagehide", keep);  // what a recipe filled in raises no event
  };
  typed();

  // The button may be far above what is in sight when a key presses it, and the answer is there.
  const tell = () => {
    const problem = document.getElementById("make-problem");
    if (!problem) { setTimeout(tell, 50); return; }
    new MutationObserver(() => {
      if (problem.textContent.trim()) problem.scrollIntoView({block: "nearest"});
    }).observe(problem, {childList: true, characterData: true, subtree: true});
  };
  tell();

  // Ctrl+Enter presses the main button of the open tab.
  addEventListener("keydown", event => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const main = ["draw", "compare", "look"].map(id => document.getElementById(id))
      .find(button => button?.offsetParent);
    if (!main || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    event.stopPropagation();
    const field = document.activeElement;
    field.blur();  // a field of numbers passes its value on when it is left
    setTimeout(() => { main.click(); field.focus(); });
  }, true);
}
