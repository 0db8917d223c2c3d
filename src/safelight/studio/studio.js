// What shows the server's own state. Text from people goes in as text, never as HTML.
const safelight = (() => {
  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  const ask = async (path, options) => {
    const answer = await fetch(path, options);
    const body = await answer.json();
    if (answer.status === 401) throw new Error("it wants its token again: reload this page");
    if (!answer.ok) throw new Error(body.detail || `the server said ${answer.status}`);
    return body;
  };

  const final = job => !["queued", "running"].includes(job.status);
  const words = job => {  // a prompt may have 16,384 letters; all of them are in the recipe
    const letters = [...job.settings.prompt || "(no prompt)"];
    return letters.length > 160 ? `${letters.slice(0, 160).join("")}…` : letters.join("");
  };
  const png = data => `data:image/png;base64,${data}`;

  // --- one picture, with its recipe and what can be done with it ---------------------------------

  const dialog = () => {
    let box = document.getElementById("picture");
    if (!box) {
      box = make("dialog", {id: "picture"});
      box.addEventListener("click", event => { if (event.target === box) box.close(); });
      document.querySelector(".gradio-container .contain").append(box);
    }
    return box;
  };

  const open = (job, picture, events, changed) => {
    const box = dialog();
    const act = (label, name) => make("button", {
      type: "button", textContent: label,
      onclick: () => { box.close(); events.trigger(name, {id: picture.id}); },
    });
    const size = `${picture.width}×${picture.height}`;
    const settings = {...job.settings, seed: picture.seed, size};
    const recipe = make("dl");
    for (const [name, value] of Object.entries(settings)) {
      if ([null, "", false].includes(value)) continue;
      if (["width", "height", "count"].includes(name)) continue;
      if (name === "prompt" && value === words(job)) continue;  // it is the title
      if (name === "eta" && !value) continue;
      recipe.append(make("dt", {textContent: name.replaceAll("_", " ")}),
                    make("dd", {textContent: String(value)}));
    }
    const several = job.pictures.length > 1 ? ` all ${job.pictures.length} pictures of this job` : "";
    const problem = make("p", {className: "problem", role: "alert"});
    const remove = make("button", {
      type: "button", textContent: several ? `Delete${several}` : "Delete",
      onclick: async () => {
        if (remove.dataset.sure !== "yes") {
          remove.dataset.sure = "yes";
          remove.textContent = "Delete for good?";
          return;
        }
        try {
          await ask(`/api/jobs/${job.id}`, {method: "DELETE"});
          box.close();
          changed();
        } catch (error) { problem.textContent = `It was not deleted: ${error.message}.`; }
      },
    });
    const close = make("button", {type: "button", className: "close", textContent: "Close",
                                  onclick: () => box.close()});
    box.replaceChildren(
      make("img", {src: `/api/pictures/${picture.id}`, alt: words(job)}),
      make("div", {},
        make("h2", {textContent: words(job)}),
        make("div", {className: "actions"},
          act("Use this one", "use"), act("All its settings", "recall"), act("Look inside", "inside"),
          make("a", {href: `/api/pictures/${picture.id}`, download: `${picture.id}.png`,
                     textContent: "Download"}),
          remove, close),
        problem, recipe, ...job.warnings.map(text => make("p", {textContent: text}))));
    box.setAttribute("aria-label", "A picture");
    box.showModal();
  };

  const thumbnails = (grid, jobs, events, changed) => {
    const shown = JSON.stringify(jobs.map(job => job.pictures.map(picture => picture.id)));
    if (grid.dataset.shown === shown) return;  // what has the focus keeps it
    grid.dataset.shown = shown;
    grid.replaceChildren(...jobs.flatMap(job => job.pictures.map(picture => make("button",
      {type: "button", title: words(job), onclick: () => open(job, picture, events, changed)},
      make("img", {src: `/api/pictures/${picture.id}/thumbnail`, alt: words(job), loading: "lazy"})))));
  };

  // --- a picture on its way into the editor ---------------------------------------------------

  const MOST_SIDE = 2048;  // that can be drawn: a photo of a phone would take its browser a minute

  const fitting = async file => {
    const whole = await createImageBitmap(file);
    const scale = MOST_SIDE / Math.max(whole.width, whole.height);
    if (scale >= 1) return file;
    const canvas = new OffscreenCanvas(Math.round(whole.width * scale), Math.round(whole.height * scale));
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    return new File([await canvas.convertToBlob()], "picture.png", {type: "image/png"});
  };

  const hand = async (input, file) => {
    const easel = input.closest("#easel");
    easel.parentElement.querySelector(".unread")?.remove();
    try {
      const files = new DataTransfer();
      files.items.add(await fitting(file));
      input.files = files.files;
      input.dataset.fits = "yes";
      input.dispatchEvent(new Event("change", {bubbles: true}));
    } catch {
      easel.before(make("p", {className: "problem unread", role: "alert",
                              textContent: `“${file.name}” is no picture that this browser can read.`}));
    }
  };

  addEventListener("change", event => {
    const input = event.target;
    if (!input.matches?.("#easel input[type=file]") || !input.files.length) return;
    if (input.dataset.fits) { delete input.dataset.fits; return; }
    event.stopImmediatePropagation();
    hand(input, input.files[0]);
  }, true);

  addEventListener("drop", event => {
    const input = event.target.closest?.("#easel")?.querySelector("input[type=file]");
    const file = event.dataTransfer?.files[0];
    if (!input || !file) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
    hand(input, file);
  }, true);

  // --- what was typed --------------------------------------------------------------------------

  // Gradio loads the page anew when a server that was away is back.
  const typed = () => {
    const prompt = document.querySelector("#prompt textarea");
    if (!prompt) { setTimeout(typed, 50); return; }
    if (!prompt.value) {
      prompt.value = sessionStorage.getItem("prompt") ?? "";
      prompt.dispatchEvent(new Event("input", {bubbles: true}));
    }
    prompt.addEventListener("input", () => sessionStorage.setItem("prompt", prompt.value));
  };
  typed();

  // --- what is drawn just now ------------------------------------------------------------------

  const now = (element, {trigger, watch, props}) => {
    const events = {trigger};
    const figure = label => {
      const image = make("img", {alt: label});
      return [image, make("figure", {}, image, make("figcaption", {textContent: label}))];
    };
    const [clean, cleanFigure] = figure("Clean estimate");
    const [noisy, noisyFigure] = figure("Noisy state");
    const title = make("p", {className: "prompt"});
    const bar = make("progress", {max: 1, value: 0});
    bar.setAttribute("aria-label", "Steps taken");
    const left = make("p", {className: "left"});
    const cancel = make("button", {type: "button", textContent: "Cancel"});
    const live = make("div", {className: "live", hidden: true},
      title, make("div", {className: "pair"}, cleanFigure, noisyFigure), bar,
      make("div", {className: "row"}, left, cancel));
    const waiting = make("ul", {className: "waiting"});
    const status = make("p", {className: "status", role: "status"});
    const newest = make("div", {className: "grid newest"});
    const failures = make("div", {className: "problem", role: "alert"});
    element.querySelector(".now").replaceChildren(failures, status, live, waiting, newest);

    let source = null, followed = null, began = null, timer = null, down = false;
    const mine = new Set();  // asked for on this page: shown before what others ask for
    const seen = new Set();  // that were to be drawn when this page last looked

    const progress = job => {
      const {step, steps} = job.progress;
      if (!steps) { left.textContent = "Waiting for its turn"; bar.removeAttribute("value"); return; }
      if (!began || step < began.step) began = {at: performance.now(), step};  // or begun anew
      const pace = (performance.now() - began.at) / (step - began.step);
      const seconds = Math.ceil(pace * (steps - step) / 1000);
      const rest = step > began.step ? `, ${seconds} s left` : "";
      left.textContent = `Step ${step} of ${steps}${rest}`;
      bar.value = step / steps;
    };

    const follow = job => {
      if (followed === job.id && source && source.readyState !== EventSource.CLOSED) return;
      source?.close();
      if (followed !== job.id) {
        began = null;
        for (const image of [clean, noisy]) image.removeAttribute("src");
      }
      followed = job.id;
      title.textContent = words(job);
      cancel.onclick = async () => {
        try { await ask(`/api/jobs/${job.id}`, {method: "DELETE"}); }
        catch (error) { status.textContent = `It was not cancelled: ${error.message}.`; }
        refresh();
      };
      live.hidden = false;
      progress(job);
      source = new EventSource(`/api/jobs/${job.id}/events`);
      const on = (kind, then) => source.addEventListener(kind, event => then(JSON.parse(event.data)));
      on("progress", event => progress(event.job));
      on("picture", event => { progress(event.job); refresh(); });
      on("preview", event => {
        clean.src = png(event.preview);
        noisy.src = png(event.noisy);
        live.dataset.late = performance.timeOrigin + performance.now() - 1000 * event.at;
        progress(event.job);
      });
      on("end", event => { source.close(); told(event.job); refresh(); });
    };

    const told = job => {
      if (followed === job.id) { followed = null; live.hidden = true; }
      if (job.status === "failed") status.textContent = "";  // `failures` tells
      else if (job.status === "cancelled") status.textContent = `“${words(job)}” was cancelled.`;
      else status.textContent = `“${words(job)}” is done.`;
    };

    const refresh = async () => {
      clearTimeout(timer);
      let busy = true;
      try {
        const jobs = await ask("/api/jobs?limit=60");
        if (down) status.textContent = "The server is back.";
        down = false;
        const open = jobs.filter(job => !final(job)).reverse();
        for (const job of jobs) {
          if (!final(job)) seen.add(job.id);
          else if (seen.delete(job.id) && job.status === "failed") {
            failures.append(make("p", {textContent: `“${words(job)}” failed: ${job.error}`}));
          } else if (mine.delete(job.id)) told(job);  // a quick one, that was never followed
        }
        const ours = open.filter(job => mine.has(job.id)), theirs = ours.length ? ours : open;
        const first = theirs.find(job => job.id === followed)
          || theirs.find(job => job.status === "running") || theirs[0];
        if (first) follow(first);
        else if (followed) {
          const ended = jobs.find(job => job.id === followed);
          source?.close();
          if (ended) told(ended); else live.hidden = true;
        }
        waiting.replaceChildren(...open.filter(job => job !== first).map(job => make("li", {},
          make("span", {textContent: words(job)}),
          make("span", {textContent: job.progress.steps
            ? `${job.progress.step} of ${job.progress.steps}` : "waiting"}),
          make("button", {type: "button", textContent: "Cancel", ariaLabel: `Cancel ${words(job)}`,
            onclick: async () => {
              await ask(`/api/jobs/${job.id}`, {method: "DELETE"}).catch(() => {});
              refresh();
            }}))));
        thumbnails(newest, jobs.filter(job => job.pictures.length).slice(0, 8), events, refresh);
        busy = open.length > 0;
      } catch (error) {
        down = true;
        status.textContent = error instanceof TypeError || error instanceof SyntaxError
          ? "The server does not answer; this page goes on when it does."
          : `The server said: ${error.message}.`;
      }
      timer = setTimeout(refresh, busy ? 1000 : 4000);
    };

    watch("value", () => {
      mine.add(props.value);
      seen.add(props.value);
      failures.replaceChildren();
      element.scrollIntoView({block: "nearest"});  // on a phone it is below the form
      refresh();
    });
    refresh();
  };

  // --- all that was made -----------------------------------------------------------------------

  const find = (element, {trigger, watch}) => {
    const events = {trigger};
    const field = make("input", {type: "search", placeholder: "Words of the prompt", maxLength: 200});
    const grid = make("div", {className: "grid"});
    const status = make("p", {className: "status", role: "status"});
    const more = make("button", {type: "button", textContent: "Older ones", hidden: true});
    element.querySelector(".find").replaceChildren(
      make("label", {}, "Search ", field), status, grid, more);
    let jobs = [], asked = 0;

    const load = async before => {
      const mine = ++asked;
      const query = new URLSearchParams({limit: 60, search: field.value});
      if (before) query.set("before", before);
      try {
        const page = await ask(`/api/jobs?${query}`);
        if (mine !== asked) return;  // a newer search is on its way
        jobs = [...(before ? jobs : []), ...page];
        more.hidden = page.length < 60;
        const made = jobs.filter(job => job.pictures.length);
        if (!made.length && !more.hidden) return load(jobs.at(-1).created_at);  // all cancelled
        const count = made.reduce((sum, job) => sum + job.pictures.length, 0);
        status.textContent = count ? `${count} ${count === 1 ? "picture" : "pictures"}`
          : field.value ? "No picture has these words in its prompt." : "Nothing has been made yet.";
        thumbnails(grid, made, events, () => load());
      } catch (error) { status.textContent = `The gallery cannot be read: ${error.message}.`; }
    };

    field.addEventListener("input", () => load());
    more.addEventListener("click", () => load(jobs.at(-1).created_at));
    watch("value", () => load());
    load();
  };

  return {now, find};
})();
