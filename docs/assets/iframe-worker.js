// The search runs in a worker, which no browser starts from a file: there a hidden frame stands for it.
if (location.protocol === "file:") {
  const load = (page, source) =>
    new Promise((resolve) => {
      const script = page.createElement("script");
      Object.assign(script, { src: source, onload: resolve });
      page.body.append(script);
    });

  // the theme's worker asks for this name
  window.IFrameWorker = class extends EventTarget {
    constructor(source) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      this.inner = this.frame.contentWindow;
      this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inner.importScripts = async (...sources) => {
        for (const each of sources) await load(this.inner.document, each);
      };
      this.loaded = load(this.inner.document, source);
    }

    async postMessage(data) {
      await this.loaded;
      this.inner.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
